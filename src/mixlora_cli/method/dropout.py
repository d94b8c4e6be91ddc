"""Dropout as a mask of one byte a number, drawn from few random words.

torch draws one random number for each feature on the CPU, one after the other, which takes longer there than a narrow
layer's matrix product. Four masks of 16 bits fit into one 64-bit word.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 2**16
"""Probabilities are multiples of 1 / STEPS; what is kept is scaled by the exact inverse of the one that was used."""


def dropped_share(probability: float) -> float:
    """The multiple of 1 / STEPS next to `probability`: what `keep_mask` really drops."""
    return round(probability * STEPS) / STEPS


def keep_mask(like: Tensor, probability: float) -> Tensor:
    """Mask of `like`'s shape, uint8: 1 where a number is kept, 0 where dropped; from torch's generator of the device.

    A seed repeats it, and so does gradient checkpointing, which restores that generator. Multiplying by it is
    quicker on the CPU than filling by a bool mask.
    """
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    # From the least to the greatest of 64 bits: left to itself, `random_` never sets the sign.
    lanes = words.random_(-(2**63), None).view(torch.int16)[: like.numel()]
    return (lanes >= round(probability * STEPS) - STEPS // 2).view(torch.uint8).view(like.shape)
