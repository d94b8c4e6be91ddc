"""How evenly, how variedly and how steadily routers use their factors: measures of selections as functions of tensors.

Sizes: L layers, B instances, E factors in a pool, r of them selected, T tasks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COLLAPSED_BELOW = 0.1
"""A router whose `variety` is less than this has collapsed."""


def new_tally(num_layers: int, num_factors: int, device: torch.device) -> Tensor:
    """Zeros (L, 2E + 1) int64: uses of each factor of A, of each factor of B, factors that A and B share."""
    return torch.zeros(num_layers, 2 * num_factors + 1, dtype=torch.int64, device=device)


def count(tally: Tensor, index_a: Tensor, index_b: Tensor) -> None:
    """Add the selections (L, B, r) of a forward pass to a tally, in place; the same few operations for any L."""
    num_factors = tally.shape[1] // 2
    used = torch.cat([index_a, index_b + num_factors], dim=-1).flatten(1)
    tally.scatter_add_(1, used, torch.ones_like(used))
    tally[:, -1] += num_shared(index_a, index_b).sum(dim=-1)


def count_by_task(tally: Tensor, tasks: Tensor, index_a: Tensor, index_b: Tensor) -> None:
    """Add the selections (L, B, r) of instances of tasks (B,) to a tally (L, T, 2E) of both pools, in place."""
    num_layers, _, width = tally.shape
    used = torch.cat([index_a, index_b + width // 2], dim=-1) + (tasks * width).view(1, -1, 1)
    used = used.flatten(1)
    tally.view(num_layers, -1).scatter_add_(1, used, torch.ones_like(used))


def task_information(counts: Tensor, rank: int) -> Tensor:
    """Mutual information (nats) of an instance's task and one of its factors: (L, T, E) uses -> (L,).

    0: the task says nothing of the factors; at most log(E / r) if each task has r factors of its own. From few
    instances a plain estimate is too high: by (E - r) (T - 1) / (2 r N) of N instances (Miller, 1955, for r factors
    that differ), which is taken off, so that it is around zero where there is nothing.
    """
    num_factors = counts.shape[-1]
    used = counts.sum(dim=(1, 2)).double()
    marginals = entropy(counts.sum(dim=1)) + entropy(counts.sum(dim=2))
    tasks = (counts.sum(dim=2) > 0).sum(dim=1)
    excess = (num_factors - rank) * (tasks - 1) / (2 * used.clamp(min=1))
    return marginals - entropy(counts.flatten(1)) - excess


def split_tally(tally: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of A (L, E), counts of B (L, E) and shared factors (L,) of a tally."""
    counts_a, counts_b = tally[:, :-1].chunk(2, dim=1)
    return counts_a, counts_b, tally[:, -1]


def num_shared(one: Tensor, other: Tensor) -> Tensor:
    """Factors that are in both selections, whatever their order: (..., r), (..., r) -> (...)."""
    return (one.unsqueeze(-1) == other.unsqueeze(-2)).sum(dim=(-1, -2))


def churn(before: Tensor, now: Tensor) -> Tensor:
    """Share of the selected factors that were not selected before: (L, B, r), (L, B, r) -> (L,)."""
    return 1 - num_shared(before, now).double().mean(dim=-1) / now.shape[-1]


def entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of shares that are proportional to counts: (..., E) -> (...) fp64; zero counts give 0."""
    shares = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return -torch.xlogy(shares, shares).sum(dim=-1)


def normalised_entropy(counts: Tensor) -> Tensor:
    """Entropy of factor use as a share of log E: (L, E) -> (L,).

    1: all factors are used equally often; log r / log E, the least: every instance gets the same r factors. A pool
    of one factor counts as evenly used.
    """
    num_factors = counts.shape[-1]
    return entropy(counts) / math.log(num_factors) if num_factors > 1 else torch.ones_like(entropy(counts))


def unused_share(counts: Tensor) -> Tensor:
    """Share of the factors that no instance got: (L, E) -> (L,)."""
    return (counts == 0).double().mean(dim=-1)


def entropy_of_own_factors(tasks: Tensor, rank: int, num_factors: int) -> float:
    """Entropy (nats) of factor use to expect if each task kept to r factors of its own, drawn by chance.

    log r + (1 - r / E) H(shares of the tasks), at most log E. Two tasks share a factor of theirs with probability
    r / E, and only their other factors tell them apart; for two tasks this is the exact mean, for more a close bound.

    Args:
        tasks: (T,) instances of each task.
    """
    apart = (1 - rank / num_factors) * entropy(tasks).item()
    return min(math.log(rank) + apart, math.log(num_factors))


def variety(counts: Tensor, tasks: Tensor, rank: int) -> Tensor:
    """How far the factors depend on the instance: (L, E) counts, (T,) instances of each task -> (L,).

    0: every instance gets the same r factors; 1: as varied as if each task had r factors of its own
    (`entropy_of_own_factors`); above 1: instances of one task differ, too. NaN where there is nothing to choose
    (E = r) or nothing to tell apart (one task).
    """
    least = math.log(rank)
    expected = entropy_of_own_factors(tasks, rank, counts.shape[-1])
    if expected - least < 1e-9:
        return torch.full(counts.shape[:-1], math.nan, dtype=torch.float64, device=counts.device)
    return (entropy(counts) - least) / (expected - least)


def collapsed(variety_a: Tensor, variety_b: Tensor) -> Tensor:
    """(L,) bool: layers of which one of the routers gives all instances nearly the same factors, whatever their task.

    Of two tasks with equally many instances, E=16 and r=4, a variety of 0.1 means: 99 of 100 instances alike.
    """
    return (variety_a < COLLAPSED_BELOW) | (variety_b < COLLAPSED_BELOW)
