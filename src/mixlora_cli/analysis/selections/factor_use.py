"""Which factors a task uses, what two tasks have in common, and whether unseen tasks take those of their partners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import factorial

import numpy as np

from mixlora_cli.analysis.selections.space import Floats, Space

_ALL_MATCHINGS = 5040
"""At most so many matchings are all tried; of more, as many are drawn."""


def factor_use(space: Space, table: Floats) -> Floats:
    """(T, E) share of each task's instances that select a factor; a row sums to r."""
    use: Floats = table.T @ space.vectors / table.sum(axis=0)[:, None]
    return use


def overlap(use: Floats, rank: int) -> Floats:
    """(T, T) sum over factors of the lesser of two tasks' use, over r: 0 = no factor in common, 1 = the same use."""
    shared: Floats = np.minimum(use[:, None, :], use[None, :, :]).sum(axis=2) / rank
    return shared


def mean_similarity(space: Space, table: Floats) -> Floats:
    """(T, T) mean Jaccard similarity of an instance of one task and one of another; within a task, of two others.

    nan within a task of one instance.
    """
    sums = table.T @ (1 - space.distance) @ table
    sizes = table.sum(axis=0)
    counts = np.outer(sizes, sizes)
    np.fill_diagonal(sums, sums.diagonal() - sizes)
    np.fill_diagonal(counts, counts.diagonal() - sizes)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


@dataclass(frozen=True)
class Matching:
    """Whether unseen tasks use the factors of their seen partners more than those of the other pairs' seen tasks."""

    partner: float
    """Mean overlap of partners."""
    others: float
    """Mean overlap with the seen tasks of the other pairs."""
    nearest: int
    """Unseen tasks whose partner is the seen task of the largest overlap; a tie counts."""
    count: int
    """P."""
    p: float
    """Share of all ways to match them whose mean overlap reaches that of the given one."""


def match_pairs(shared: Floats, pairs: Sequence[tuple[int, int]], seed: int) -> Matching | None:
    """Of `overlap` (T, T) and the (seen, unseen) numbers of P pairs; None for a single pair, which proves nothing."""
    if len(pairs) < 2:
        return None
    seen, unseen = (np.array(side) for side in zip(*pairs, strict=True))
    grid = shared[np.ix_(unseen, seen)]
    count = len(pairs)
    rows = np.arange(count)
    if factorial(count) <= _ALL_MATCHINGS:
        ways = np.array(list(permutations(range(count))))
        extra = 0
    else:
        generator = np.random.default_rng(seed)
        ways = np.stack([generator.permutation(count) for _ in range(_ALL_MATCHINGS)])
        extra = 1  # the given one is not among the draws
    means = grid[rows, ways].mean(axis=1)
    value = float(grid.diagonal().mean())
    reached = int((means >= value - 1e-12).sum()) + extra
    return Matching(
        partner=value,
        others=float(grid[~np.eye(count, dtype=bool)].mean()),
        nearest=int((grid.diagonal() >= grid.max(axis=1) - 1e-12).sum()),
        count=count,
        p=reached / (len(ways) + extra),
    )
