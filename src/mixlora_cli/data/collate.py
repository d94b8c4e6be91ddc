"""Items to the tensors that a Hugging Face LLaVA's `forward` or `generate` takes."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mixlora_cli.data.encode import IGNORE, Item
from mixlora_cli.data.images import as_shown, open_picture, read_picture

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
class DummyImage:
    """A blank picture for batches that have none, which changes no result.

    Where the projector is trained, or its weights are spread over processes (ZeRO-3), every process has to run it in
    every batch: one that skips it lets the others wait for ever. So a batch of text-only records gets the tokens of one
    blank picture behind the end of its first row: masked like padding and without labels. No real token looks at them
    (attention looks back), so loss and gradients stay what they were; the projector's gradient is zero.
    """

    image_token_id: int
    num_image_tokens: int
    features: Tensor
    """(1, 3, H, W) pixels or (1, T, C) tower features, whichever the batches hold."""

    def join(self, batch: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
        """A right-padded batch (B, S) without pictures to one (B, S + num_image_tokens) with the blank picture."""
        added = (0, self.num_image_tokens)
        ids = F.pad(batch["input_ids"], added, value=pad_token_id)
        ids[0, -self.num_image_tokens :] = self.image_token_id
        wider = {"input_ids": ids, "attention_mask": F.pad(batch["attention_mask"], added, value=0)}
        if "labels" in batch:
            wider["labels"] = F.pad(batch["labels"], added, value=IGNORE)
        return batch | wider | {"pixel_values": self.features}


def build_dummy_image(image_token_id: int, num_image_tokens: int, features: Features) -> DummyImage:
    """A dummy whose features come from where those of real pictures come from."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        blank = Path(folder) / "blank.png"
        Image.new("RGB", (32, 32), "black").save(blank)  # the image processor makes it as large as it needs
        return DummyImage(image_token_id, num_image_tokens, features([blank]))


@dataclass(frozen=True)
class Collator:
    """Pads a batch of B items to its longest, S tokens.

    Gives `input_ids` and `attention_mask` (B, S), `labels` (B, S) if `with_labels`, and `pixel_values` with
    one row for each item that has a picture, in order; a batch of text-only items has no such key, or that of
    the dummy image. Training pads on the right, generation on the left (new tokens must follow the prompt at
    once). `with_indices` adds `indices` (B,): `Record.index` of each row; embeddings (d,) by task add
    `task_embeddings` (B, d), and `routing_seed` adds `routing_seeds` (B,), each instance's own (`draw_seed`).
    """

    pad_token_id: int
    features: Features
    padding: Literal["right", "left"] = "right"
    with_labels: bool = True
    with_indices: bool = False
    embeddings: Mapping[str, Tensor] | None = None
    dummy_image: DummyImage | None = None
    routing_seed: int | None = None

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """The batch's tensors, on the CPU."""
        batch = {
            "input_ids": self._pad([item.input_ids for item in items], self.pad_token_id),
            "attention_mask": self._pad([[1] * item.length for item in items], 0),
        }
        if self.with_labels:
            batch["labels"] = self._pad([item.labels for item in items], IGNORE)
        if pictures := [item.image for item in items if item.image is not None]:
            batch["pixel_values"] = self.features(pictures)
        elif self.dummy_image is not None:
            batch = self.dummy_image.join(batch, self.pad_token_id)
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


def draw_seed(seed: int, item: Item) -> int:
    """A seed of an instance's own for routing=random, so that neither its neighbours nor its turn change its factors.

    63 bits of a digest of `seed`, the prompt's tokens and the bytes of its picture file.

    Raises:
        OSError: the picture cannot be read.
    """
    digest = hashlib.sha256(f"{seed} {item.length} ".encode())
    digest.update(array("q", item.input_ids).tobytes())
    if item.image is not None:
        digest.update(read_picture(item.image))
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def generation_collator(
    pad_token_id: int,
    features: Features,
    embeddings: Mapping[str, Tensor] | None = None,
    routing_seed: int | None = None,
) -> Collator:
    """Left padding, no labels."""
    return Collator(pad_token_id, features, "left", False, embeddings=embeddings, routing_seed=routing_seed)
