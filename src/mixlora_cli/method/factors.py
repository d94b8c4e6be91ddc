"""The parameters of one layer that are not plain linear maps.

They sit in modules that are *called* with what they need, so that sharding (ZeRO-3, FSDP) gathers them in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FactorPool(nn.Module):
    """E factors of one side of a layer, `weight` (E, features)."""

    weight: nn.Parameter

    def __init__(self, num_factors: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_factors, features))

    def init_like_lora(self) -> FactorPool:
        """Kaiming uniform with a = sqrt 5 over the features, as PEFT initialises LoRA's A."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        return self

    def forward(self, index: Tensor) -> Tensor:
        """Rows `index` (B, r) of the pool: (B, r, features)."""
        return F.embedding(index, self.weight)

    def extra_repr(self) -> str:
        """Shown in the parentheses when the model is printed."""
        return f"num_factors={self.weight.shape[0]}, features={self.weight.shape[1]}"


class ConditionalRouter(nn.Module):
    """The CFS router's tensor W_AB, `weight` (r, d_in, E), and the way it meets A (Eq. 7 or the published code's)."""

    weight: nn.Parameter

    def __init__(
        self, rank: int, in_features: int, num_factors: int, contract: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.contract = contract
        self.weight = nn.Parameter(torch.empty(rank, in_features, num_factors))
        # The default of nn.Linear for this fan-in; kaiming_uniform_ would misread a three-dimensional weight's.
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, rows_a: Tensor) -> Tensor:
        """Selected factors of A (B, r, d_in), in order -> logits (B, r, E) in fp32."""
        return self.contract(rows_a.to(self.weight.dtype), self.weight).float()
