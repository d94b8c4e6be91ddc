"""Differences of a table's pairs: tested on the instances that both rows answered, and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mixlora_cli.benchmarks.registry import MEAN_TITLE
from mixlora_cli.evaluation.compare import Group, paired_over_seeds, read_run, shared_by_all
from mixlora_cli.reproduce.build import RowValues, TableValues
from mixlora_cli.reproduce.layout import AVERAGE_TITLE, Pair
from mixlora_cli.stats import (
    Difference,
    Floats,
    compare_means,
    compare_right_over_seeds,
    compare_seeds,
    holm,
    why_untested,
)


@dataclass(frozen=True)
class PairLine:
    """A pair's difference in one column, left minus right."""

    pair: Pair
    column: str
    paired: Difference
    """On the instances that both answered; the mean over `paired_seeds`."""
    paired_seeds: tuple[int, ...]
    """The seeds that both have, else the first of the left row."""
    p_holm: float | None
    """Corrected for the number of columns; the means are left alone."""
    seeds: Difference | None
    """Of the means over seeds; None unless both rows have several, and some spread."""
    untested: str = ""
    """Why several seeds of both rows have no test."""


def pair_lines(table: TableValues) -> list[PairLine]:
    """Every pair of the layout that both rows are there for, column by column."""
    lines: list[PairLine] = []
    for pair in table.layout.pairs:
        left, right = table.row(pair.left), table.row(pair.right)
        differences = _Paired(table, left, right)
        fresh = []
        for column in table.columns:
            seeds = _paired_seeds(left, right, column)
            if seeds and (difference := differences.find(column, seeds)):
                ours = tuple(seed for seed, _ in seeds)
                over = _over_seeds(left, right, column)
                fresh.append(PairLine(pair, column, difference, ours, None, *over))
        lines += _corrected(fresh)
    return lines


Seeds = tuple[tuple[int, int], ...]
"""(seed of the left row, seed of the right row) of trainings that are compared with one another."""


def _paired_seeds(left: RowValues, right: RowValues, column: str) -> Seeds:
    """The seeds that both have the column of, each with itself; where there is none, each one's first."""
    ours, theirs = (
        sorted(seed for seed, values in row.by_seed.items() if column in values) for row in (left, right)
    )
    both = tuple((seed, seed) for seed in ours if seed in theirs)
    return both or tuple(zip(ours[:1], theirs[:1], strict=False))


class _Paired:
    """Differences of two rows on the instances that both answered; evaluations are read once for the same seeds."""

    def __init__(self, table: TableValues, left: RowValues, right: RowValues) -> None:
        self._table, self._left, self._right = table, left, right
        self._unseen: dict[Seeds, dict[str, Difference]] = {}

    def find(self, column: str, seeds: Seeds) -> Difference | None:
        """The mean over `seeds`."""
        if self._table.layout.on_seen_tasks:
            return self._on_seen(column, seeds)
        if seeds not in self._unseen:
            self._unseen[seeds] = self._on_unseen(seeds)
        return self._unseen[seeds].get(column)

    def _on_unseen(self, seeds: Seeds) -> dict[str, Difference]:
        theirs = tuple(read_run(str(self._right.evaluations[seed])) for _, seed in seeds)
        ours = tuple(read_run(str(self._left.evaluations[seed])) for seed, _ in seeds)
        return paired_over_seeds(*(Group(runs[0].results.label, runs) for runs in (theirs, ours)))

    def _on_seen(self, column: str, seeds: Seeds) -> Difference:
        if column == AVERAGE_TITLE:
            by_task = [np.mean(self._by_seed(task, seeds), axis=0) for task in self._table.titles]
            return compare_means(by_task, 100)
        task = next(task for task, title in self._table.titles.items() if title == column)
        return compare_right_over_seeds(self._by_seed(task, seeds))

    def _by_seed(self, task: str, seeds: Seeds) -> list[Floats]:
        """Left minus right (n,) for each pair of trainings, on the instances that all of them answered."""
        both = [(self._right.marks[theirs][task], self._left.marks[ours][task]) for ours, theirs in seeds]
        indices = shared_by_all([marks for each in both for marks in each], task)
        return [after.array(indices) - before.array(indices) for before, after in both]


def _over_seeds(left: RowValues, right: RowValues, column: str) -> tuple[Difference | None, str]:
    """The difference, and why there is none although both have several seeds."""

    def values(row: RowValues) -> list[float]:
        return [found[column].value for found in row.by_seed.values() if column in found]

    before, after = values(right), values(left)
    why = why_untested(before, after) if min(len(before), len(after)) > 1 else ""
    return compare_seeds(before, after), why


def _corrected(lines: Sequence[PairLine]) -> list[PairLine]:
    tested = [line for line in lines if line.column not in (MEAN_TITLE, AVERAGE_TITLE)]
    corrected = iter(holm([line.paired.p for line in tested]))
    return [replace(line, p_holm=next(corrected)) if line in tested else line for line in lines]
