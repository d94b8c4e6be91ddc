"""Dropout as a list of the numbers that are dropped, which is shorter than a mask and quicker to draw.

torch draws one random number for each feature on the CPU, one after the other, which takes longer there than a narrow
layer's matrix product. Here as many places are drawn, each of all and with repetitions, as leave the share out that is
asked for: for a probability of 0.05 that is one draw for twenty numbers. Places are as good as independent: two of N
are both dropped with a chance that lies by a factor of the order of 1 / N from the product of their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def num_draws(count: int, probability: float) -> int:
    """How often a place of `count` has to be drawn until each was missed with 1 - `probability`, rounded."""
    return round(math.log1p(-probability) / math.log1p(-1 / count)) if count > 1 else 0


def dropped_share(count: int, probability: float) -> float:
    """The chance next to `probability` of each of `count` numbers to be among `dropped_places`."""
    return -math.expm1(num_draws(count, probability) * math.log1p(-1 / count)) if count > 1 else 0.0


def dropped_places(like: Tensor, probability: float) -> Tensor:
    """Places in the flattened `like` that are dropped, some more than once; from torch's generator of the device.

    A seed repeats it, and so does gradient checkpointing, which restores that generator. How many there are depends on
    the size alone. torch's draw from 0 to N - 1 favours some numbers by N / 2^32 of their chance at most.
    """
    count = like.numel()
    kind = torch.int32 if count < 2**31 else torch.int64
    return torch.empty(num_draws(count, probability), dtype=kind, device=like.device).random_(max(count, 1))


def zero_(values: Tensor, places: Tensor) -> Tensor:
    """Set `values`, which lie in one piece, to zero at these places of all."""
    values.view(-1).index_fill_(0, places.long(), 0)
    return values
