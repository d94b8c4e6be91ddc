"""Selections as sets of factors: the distinct ones, how far apart they are, and which task has how many of each.

Sizes: n instances, E factors in a pool, r of them selected, K distinct selections, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Space:
    """The selections of n instances in one layer, of A or of B. The order inside a selection does not count."""

    vectors: npt.NDArray[np.bool_]
    """(K, E), which factors are in each distinct selection."""
    group: Ints
    """(n,) number of each instance's selection."""

    @property
    def rank(self) -> int:
        """r, factors in a selection."""
        return int(self.vectors[0].sum())

    @property
    def shared(self) -> Ints:
        """(K, K) factors that two selections have in common."""
        vectors = self.vectors.astype(np.float64)  # exact, and much faster than a product of integers
        return (vectors @ vectors.T).round().astype(np.int64)

    @property
    def distance(self) -> Floats:
        """(K, K) Jaccard distance: 1 - |common| / |union|."""
        shared = self.shared
        return 1 - shared / (2 * self.rank - shared)


def make_space(index: Ints, num_factors: int) -> Space:
    """Of the selected factors (n, r) of each instance."""
    vectors = np.zeros((len(index), num_factors), dtype=np.bool_)
    np.put_along_axis(vectors, index, True, axis=1)
    distinct, group = np.unique(vectors, axis=0, return_inverse=True)
    return Space(distinct, group.reshape(-1).astype(np.int64))


def contingency(group: Ints, labels: Ints, num_tasks: int) -> Floats:
    """(K, T) how many of a task's instances have each selection."""
    num_groups = int(group.max()) + 1
    counts = np.bincount(group * num_tasks + labels, minlength=num_groups * num_tasks)
    return counts.reshape(num_groups, num_tasks).astype(np.float64)
