"""Items to the tensors that a Hugging Face LLaVA's `forward` or `generate` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mixlora_cli.data.batches import Item
from mixlora_cli.data.draws import draw_seed
from mixlora_cli.data.encode import IGNORE
from mixlora_cli.data.pictures import as_shown, open_picture
from mixlora_cli.data.stand_in import StandIn

Features = Callable[[list[Path]], Tensor]
"""Pictures to pixel values (n, 3, H, W), or to cached features of the frozen tower (n, T, C)."""


@dataclass(frozen=True)
class PixelLoader:
    """Opens pictures and runs the model's image processor on them: the features of a run without a cache."""

    image_processor: Callable[..., Any]

    def __call__(self, paths: list[Path]) -> Tensor:
        """Pixel values (n, 3, H, W)."""
        images = []
        for path in paths:
            with open_picture(path) as image:
                images.append(as_shown(image, path).convert("RGB"))
        pixels: Tensor = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels


@dataclass(frozen=True)
class Collator:
    """Pads a batch of B items to its longest, S tokens.

    Gives `input_ids` and `attention_mask` (B, S), `labels` (B, S) if `with_labels`, and `pixel_values` with
    one row for each item that has a picture, in order; a batch of text-only items has no such key, or that of
    the stand-in. Training pads on the right, generation on the left (new tokens must follow the prompt at
    once). `with_indices` adds `indices` (B,): `Record.index` of each row; embeddings (d,) by task add
    `task_embeddings` (B, d), and `routing_seed` adds `routing_seeds` (B,), each instance's own (`draw_seed`).
    """

    pad_token_id: int
    features: Features
    padding: Literal["right", "left"] = "right"
    with_labels: bool = True
    with_indices: bool = False
    embeddings: Mapping[str, Tensor] | None = None
    stand_in: StandIn | None = None
    routing_seed: int | None = None

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """The batch's tensors, on the CPU."""
        ones = [[1] * item.length for item in items]
        batch = {
            "input_ids": self._pad([item.input_ids for item in items], self.pad_token_id),
            "attention_mask": self._pad(ones, 0),
        }
        if self.with_labels:
            batch["labels"] = self._pad([item.labels for item in items], IGNORE)
        pictures = [item.image for item in items if item.image is not None]
        if pictures:
            batch["pixel_values"] = self.features(pictures)
        elif self.stand_in is not None:
            batch = self.stand_in.joined(batch, self.pad_token_id, IGNORE)
        if self.with_indices:
            batch["indices"] = torch.tensor([item.index for item in items])
        if self.embeddings is not None:
            batch["task_embeddings"] = torch.stack([self.embeddings[item.task] for item in items])
        if self.routing_seed is not None:
            batch["routing_seeds"] = torch.tensor([draw_seed(self.routing_seed, item) for item in items])
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        """Rows of differing lengths to one (B, S) tensor of int64."""
        width = max(len(row) for row in rows)
        padded = torch.full((len(rows), width), value, dtype=torch.long)
        for number, row in enumerate(rows):
            start = width - len(row) if self.padding == "left" else 0
            padded[number, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        return padded


def training_collator(pad_token_id: int, features: Features) -> Collator:
    """Right padding, with labels."""
    return Collator(pad_token_id, features)


def generation_collator(
    pad_token_id: int,
    features: Features,
    embeddings: Mapping[str, Tensor] | None = None,
    routing_seed: int | None = None,
) -> Collator:
    """Left padding, no labels."""
    return Collator(
        pad_token_id,
        features,
        padding="left",
        with_labels=False,
        embeddings=embeddings,
        routing_seed=routing_seed,
    )
