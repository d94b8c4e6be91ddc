"""The parameters of one layer that are not plain linear maps.

They sit in modules that are *called* with what they need, so that sharding (ZeRO-3, FSDP) gathers them in time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora_cli.method.selection import top_factors


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


class Standardiser(nn.Module):
    """Centres and scales what a layer's routers read, feature by feature, by statistics that are taken once.

    Hidden states of language models share a few huge directions, beside which the instances' differences are lost.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.known = False
        """Whether the statistics were taken, or loaded."""

    def take(self, read: Tensor) -> None:
        """Take the statistics of descriptions (N, features); a feature that does not vary is only centred."""
        deviation, mean = torch.std_mean(read.double(), dim=0)
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1.0))
        self.known = True

    def forward(self, read: Tensor) -> Tensor:
        """(N, features) -> the same in units of standard deviations, fp32."""
        return (read - self.mean.float()) / self.deviation.float()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        stored = state_dict.get(f"{prefix}mean")
        # Zeros are what an adapter stores that was saved before its statistics were taken.
        self.known = self.known or (stored is not None and bool(stored.any()))


def clusters(read: Tensor, most: int, seed: int) -> Tensor:
    """Numbers (N,) of the groups, `most` at most, in which descriptions (N, features) point alike, by k-means.

    Of N descriptions no more groups are made than N / 4, and two at least.
    """
    from sklearn.cluster import KMeans  # takes a second
    from sklearn.exceptions import ConvergenceWarning

    count = min(most, max(2, len(read) // 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # descriptions that are equal make fewer groups
        found = KMeans(count, n_init=1, random_state=seed).fit_predict(F.normalize(read, dim=1).numpy())
    numbers: Any = np.unique(found, return_inverse=True)[1]
    return torch.from_numpy(numbers)


_RIDGE = 0.1
"""Of the descriptions' mean squared length."""
_COMMON = 3.0
"""How much of the choice is every task's, in standard deviations of a task's own: two tasks then share about three of
four factors, as they do where new routers read raw descriptions."""


def of_tasks(
    read: Tensor, tasks: Tensor, count: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Router weights (count, features) and bias (count,) that select the same `rank` factors for all of a task.

    Each factor has a value for all tasks and one for each that is linear in its mean description, so that tasks that
    are alike share more; a task's factors are those of the largest sums. Ridge regression from the instances'
    descriptions to which factors these are then gives weights and bias.

    Args:
        read: (N, features) descriptions, standardised.
        tasks: (N,) int64, whose they are, 0 to T - 1; each has one at least.
        count: factors.
        rank: how many are selected.
        generator: of the values.
    """
    share = F.one_hot(tasks).to(read.dtype)
    means = F.normalize((share / share.sum(dim=0)).T @ read, dim=1)
    own = means @ torch.randn(count, read.shape[1], generator=generator, dtype=read.dtype).T
    common = _COMMON * torch.randn(count, generator=generator, dtype=read.dtype)
    wanted = torch.zeros_like(own).scatter_(1, top_factors(own + common, rank), 1.0)[tasks]
    bias = wanted.mean(dim=0)
    products = read @ read.T
    products.diagonal().add_(_RIDGE * products.diagonal().mean())
    weights: Tensor = torch.linalg.solve(products, wanted - bias)
    return weights.T @ read, bias


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
