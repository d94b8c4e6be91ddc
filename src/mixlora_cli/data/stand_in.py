"""A picture for batches that have none, which changes no result.

Where the projector is trained, or its weights are spread over processes (ZeRO-3), every process has to run it in every
batch: one that skips it lets the others wait for ever. So a batch of text-only records gets the tokens of one blank
picture behind the end of its first row: masked like padding and without labels. No real token looks at them (attention
looks back), so loss and gradients stay what they were; the projector takes part with a gradient of zero.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_SIDE = 32  # of the blank picture; the image processor makes it as large as it needs


@dataclass(frozen=True)
class StandIn:
    """The blank picture's tokens and features."""

    image_token_id: int
    num_image_tokens: int
    features: Tensor
    """(1, 3, H, W) pixels or (1, T, C) tower features, whichever the batches hold."""

    def joined(self, batch: dict[str, Tensor], pad_token_id: int, ignored_label: int) -> dict[str, Tensor]:
        """A right-padded batch (B, S) without pictures to one (B, S + num_image_tokens) with the blank picture."""
        added = (0, self.num_image_tokens)
        ids = F.pad(batch["input_ids"], added, value=pad_token_id)
        ids[0, -self.num_image_tokens :] = self.image_token_id
        wider = {"input_ids": ids, "attention_mask": F.pad(batch["attention_mask"], added, value=0)}
        if "labels" in batch:
            wider["labels"] = F.pad(batch["labels"], added, value=ignored_label)
        return batch | wider | {"pixel_values": self.features}


def build_stand_in(
    image_token_id: int, num_image_tokens: int, features: Callable[[list[Path]], Tensor]
) -> StandIn:
    """A stand-in whose features come from where those of real pictures come from."""
    with tempfile.TemporaryDirectory() as folder:
        blank = Path(folder) / "blank.png"
        Image.new("RGB", (_SIDE, _SIDE), "black").save(blank)
        with torch.no_grad():
            return StandIn(image_token_id, num_image_tokens, features([blank]))
