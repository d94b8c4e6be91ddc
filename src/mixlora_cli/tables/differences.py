"""Differences of a table's pairs: tested on the instances that both rows answered, and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mixlora_cli.evaluation.benchmarks import MEAN_TITLE
from mixlora_cli.evaluation.comparison import Group, paired_over_seeds
from mixlora_cli.evaluation.marks import pairs, read_run, shared
from mixlora_cli.evaluation.paired import (
    Difference,
    compare_means,
    compare_right,
    compare_seeds,
    holm,
    why_untested,
)
from mixlora_cli.tables.build import RowValues, TableValues
from mixlora_cli.tables.layout import AVERAGE_TITLE, Pair


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
        if not (left.seeds and right.seeds):
            continue
        seeds = _paired_seeds(left, right)
        found = (
            _on_seen(table, left, right, seeds)
            if table.layout.on_seen_tasks
            else _on_unseen(left, right, seeds)
        )
        ours = tuple(seed for seed, _ in seeds)
        fresh = [
            PairLine(pair, column, found[column], ours, None, *_over_seeds(left, right, column))
            for column in table.columns
            if column in found
        ]
        lines += _corrected(fresh)
    return lines


def _paired_seeds(left: RowValues, right: RowValues) -> list[tuple[int, int]]:
    """The seeds that both have, each with itself; where there is none, each one's first."""
    both = [seed for seed in left.seeds if seed in right.seeds]
    return [(seed, seed) for seed in both] or [(left.seeds[0], right.seeds[0])]


def _on_unseen(left: RowValues, right: RowValues, seeds: Sequence[tuple[int, int]]) -> dict[str, Difference]:
    theirs = tuple(read_run(str(right.evaluations[seed])) for _, seed in seeds)
    ours = tuple(read_run(str(left.evaluations[seed])) for seed, _ in seeds)
    return paired_over_seeds(*(Group(runs[0].results.label, runs) for runs in (theirs, ours)))


def _on_seen(
    table: TableValues, left: RowValues, right: RowValues, seeds: Sequence[tuple[int, int]]
) -> dict[str, Difference]:
    found: dict[str, Difference] = {}
    differences = []
    for task, title in table.titles.items():
        both = [(right.marks[theirs].get(task), left.marks[ours].get(task)) for ours, theirs in seeds]
        marks = [(theirs, ours) for theirs, ours in both if theirs and ours]
        if len(marks) < len(seeds):
            continue
        arrays = [pairs(*each, shared(*each, task)) for each in marks]
        differences.append(np.mean([after - before for before, after in arrays], axis=0))
        found[title] = (
            compare_right(*arrays[0]) if len(arrays) == 1 else compare_means([differences[-1]], 100)
        )
    if len(differences) == len(table.titles):
        found[AVERAGE_TITLE] = compare_means(differences, 100)
    return found


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
