"""How far selections tell tasks apart: silhouette, neighbour purity, mutual information, each against chance.

All three are functions of the table (K, T) of counts, so that shuffling the labels costs little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import normalized_mutual_info_score

from mixlora_cli.analysis.selections.space import Floats, Ints, Space, contingency

_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Measured:
    """One number of a map beside what it is when the task labels are shuffled."""

    value: float
    chance: float
    """Mean over the shuffles."""
    low: float
    """The middle 95 percent of the shuffles begin here."""
    high: float
    p: float
    """Share of shuffles that reach the value, itself counted among them: (1 + count) / (1 + shuffles)."""
    by_task: tuple[float, ...] = ()
    """Means over each task's instances, where the number is a mean over instances."""


@dataclass(frozen=True)
class Separation:
    """The three numbers of one map."""

    silhouette: Measured
    purity: Measured
    information: Measured


def silhouettes(distance: Floats, table: Floats) -> Floats:
    """Silhouette (K, T) of an instance by its selection and its task: (b - a) / max(a, b), 0 in a task of one.

    a is the mean distance to the others of its task, b the least mean distance to the instances of another task
    (Rousseeuw, 1987).

    Args:
        distance: (K, K) between selections.
        table: (K, T) counts.
    """
    sizes = table.sum(axis=0)
    sums = distance @ table
    own = sums / np.maximum(sizes - 1, 1)
    means = sums / sizes
    num_tasks = table.shape[1]
    nearest = np.stack([np.delete(means, task, axis=1).min(axis=1) for task in range(num_tasks)], axis=1)
    larger = np.maximum(own, nearest)
    with np.errstate(invalid="ignore"):
        value = np.where(larger > 0, (nearest - own) / larger, 0.0)
    return np.where(sizes > 1, value, 0.0)


def purities(shared: Ints, rank: int, table: Floats, neighbours: int) -> Floats:
    """Share (K, T) of an instance's k nearest others that are of its task.

    Jaccard distance falls with the factors in common, of which there are 0 to r: many others are equally far. Of
    those that tie for the last places each has the same chance of one, and the mean over these chances is given.

    Args:
        shared: (K, K) factors in common.
        table: (K, T) counts.
        neighbours: k, fewer than there are instances.
    """
    taken, same = np.zeros((len(table), 1)), np.zeros_like(table)
    # Nobody is a neighbour of himself; he would be among those with all r factors in common.
    itself = np.ones_like(table)
    for common in range(rank, -1, -1):
        level = (shared == common).astype(np.float64) @ table
        # The number of others at this level is one for all tasks of a row: oneself is left out of it once.
        others = level.sum(axis=1, keepdims=True) - (common == rank)
        mine = level - itself * (common == rank)
        room = np.clip(neighbours - taken, 0, others)
        same += mine * np.divide(room, others, out=np.zeros_like(room), where=others > 0)
        taken += room
    return same / neighbours


def separation(
    space: Space, labels: Ints, num_tasks: int, neighbours: int, permutations: int, seed: int
) -> Separation:
    """The numbers of one map, with `permutations` seeded shuffles of `labels` (n,)."""
    distance, shared, rank = space.distance, space.shared, space.rank

    def by_cell(cells: Callable[[Floats], Floats]) -> Callable[[Ints], tuple[float, tuple[float, ...]]]:
        def mean(chosen: Ints) -> tuple[float, tuple[float, ...]]:
            table = contingency(space.group, chosen, num_tasks)
            sums, sizes = (cells(table) * table).sum(axis=0), table.sum(axis=0)
            return float(sums.sum() / sizes.sum()), tuple(float(x) for x in sums / sizes)

        return mean

    def information(chosen: Ints) -> tuple[float, tuple[float, ...]]:
        return float(normalized_mutual_info_score(chosen, space.group)), ()

    generator = np.random.default_rng(seed)
    shuffled = [generator.permutation(labels) for _ in range(permutations)]
    return Separation(
        _against_chance(by_cell(lambda table: silhouettes(distance, table)), labels, shuffled),
        _against_chance(by_cell(lambda table: purities(shared, rank, table, neighbours)), labels, shuffled),
        _against_chance(information, labels, shuffled),
    )


def _against_chance(
    measure: Callable[[Ints], tuple[float, tuple[float, ...]]], labels: Ints, shuffled: list[Ints]
) -> Measured:
    value, by_task = measure(labels)
    chance = np.array([measure(chosen)[0] for chosen in shuffled])
    low, high = np.percentile(chance, _INTERVAL)
    reached = int((chance >= value - 1e-12).sum())
    p = (1 + reached) / (1 + len(chance))
    return Measured(value, float(chance.mean()), float(low), float(high), p, by_task)
