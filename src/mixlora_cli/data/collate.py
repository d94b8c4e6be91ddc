"""Items to the tensors that a model's `forward` or `generate` takes."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mixlora_cli.data.chat import Chat
from mixlora_cli.data.encode import IGNORE, Item
from mixlora_cli.data.images import Picture, opened, read_picture
from mixlora_cli.data.problems import BadRecord
from mixlora_cli.errors import UserError

Rows = list[tuple[Picture, ...]]
"""The pictures of each conversation that has some."""
Features = Callable[[Rows], dict[str, Tensor]]
"""From pictures to what the model takes of them, by its argument's name."""


@dataclass(frozen=True)
class PixelLoader:
    """Opens pictures and runs the model's processor on them: the features of a run without a cache."""

    chat: Chat

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """Every tensor that the processor returns of the pictures: pixel values, and their sizes, grids or masks.

        Raises:
            UserError: the processor refuses a picture, or to put those of a batch together.
        """
        try:
            return self.chat.process([[opened(picture) for picture in row] for row in rows])[0]
        except BadRecord as bad:
            raise UserError(f"{bad.detail}; leave such pictures out, or give train.batch_size=1") from bad


@dataclass(frozen=True)
class DummyImage:
    """A blank picture for batches that have none, which changes no result.

    Where the projector is trained, or its weights are spread over processes (ZeRO-3), every process has to run it in
    every batch: one that skips it lets the others wait for ever. So a batch of text-only records gets the tokens of one
    blank picture behind the end of its first row: masked like padding and without labels. No real token looks at them
    (attention looks back), so loss and gradients stay what they were; the projector's gradient is zero.
    """

    tokens: list[int]
    """Those that stand for the picture."""
    features: dict[str, Tensor]
    """Of the one picture."""

    def join(self, batch: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
        """A right-padded batch (B, S) without pictures to one (B, S + number of tokens) with the blank picture."""
        added = (0, len(self.tokens))
        ids = F.pad(batch["input_ids"], added, value=pad_token_id)
        ids[0, -len(self.tokens) :] = torch.tensor(self.tokens)
        wider = {"input_ids": ids, "attention_mask": F.pad(batch["attention_mask"], added, value=0)}
        if "labels" in batch:
            wider["labels"] = F.pad(batch["labels"], added, value=IGNORE)
        return batch | wider | self.features


def build_dummy_image(chat: Chat, features: Features) -> DummyImage:
    """A dummy whose features come from where those of real pictures come from."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        blank = Path(folder) / "blank.png"
        Image.new("RGB", (32, 32), "black").save(blank)  # the processor makes it as large as it needs
        return DummyImage(chat.picture_tokens, features([(blank,)]))


@dataclass(frozen=True)
class Collator:
    """Pads a batch of B items to its longest, S tokens.

    Gives `input_ids` and `attention_mask` (B, S), `labels` (B, S) if `with_labels`, and what `features` makes of the
    pictures of all items, in order; a batch of text-only items has none of that, or that of the dummy image. Models
    that ask for it get `mm_token_type_ids` or `token_type_ids` (B, S), 1 where a picture's features stand.

    `packed` puts the instances one behind the other into one row of all their tokens, without padding: `position_ids`
    (1, all) begin again with each, by which attention and adapter keep them apart, and there is no `attention_mask`.

    Training pads on the right, generation on the left (new tokens must follow the prompt at once). `with_indices` adds
    `indices` (B,): `Record.index` of each row; embeddings (d,) by task add `task_embeddings` (B, d), and `routing_seed`
    adds `routing_seeds` (B,), each instance's own (`draw_seed`).
    """

    chat: Chat
    features: Features
    padding: Literal["right", "left"] = "right"
    with_labels: bool = True
    with_indices: bool = False
    embeddings: Mapping[str, Tensor] | None = None
    dummy_image: DummyImage | None = None
    routing_seed: int | None = None
    packed: bool = False

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """The batch's tensors, on the CPU."""
        if self.packed:
            batch = _packed(items)
        else:
            batch = {
                "input_ids": self._pad([item.input_ids for item in items], self.chat.pad),
                "attention_mask": self._pad([[1] * item.length for item in items], 0),
            }
            if self.with_labels:
                batch["labels"] = self._pad([item.labels for item in items], IGNORE)
        if rows := [item.images for item in items if item.images]:
            batch |= self.features(rows)
        elif self.dummy_image is not None:
            batch = self.dummy_image.join(batch, self.chat.pad)
        if self.chat.token_types is not None:
            holds_picture = torch.isin(batch["input_ids"], torch.tensor(self.chat.image_token_ids))
            batch[self.chat.token_types] = holds_picture.long()
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


def _packed(items: Sequence[Item]) -> dict[str, Tensor]:
    rows = {
        "input_ids": [token for item in items for token in item.input_ids],
        # The last token of an instance does not predict the first of the next.
        "labels": [label for item in items for label in (IGNORE, *item.labels[1:])],
        "position_ids": [position for item in items for position in range(item.length)],
    }
    return {name: torch.tensor([row], dtype=torch.long) for name, row in rows.items()}


def draw_seed(seed: int, item: Item) -> int:
    """A seed of an instance's own for routing=random, so that neither its neighbours nor its turn change its factors.

    63 bits of a digest of `seed`, the prompt's tokens and the bytes of its picture files. The prompt is all that comes
    before the last answer, so that an instance draws the same with its answer and without.

    Raises:
        OSError: the picture cannot be read.
    """
    prompt = item.input_ids[: item.prompt_length]
    digest = hashlib.sha256(f"{seed} {len(prompt)} ".encode())
    digest.update(array("q", prompt).tobytes())
    for picture in item.images:
        digest.update(read_picture(picture))
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def generation_collator(
    chat: Chat,
    features: Features,
    embeddings: Mapping[str, Tensor] | None = None,
    routing_seed: int | None = None,
) -> Collator:
    """Left padding, no labels."""
    return Collator(chat, features, "left", False, embeddings=embeddings, routing_seed=routing_seed)
