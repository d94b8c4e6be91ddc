"""Differences of a table's pairs: tested on the instances that both rows answered, and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixlora_cli.evaluation.benchmarks import MEAN_TITLE
from mixlora_cli.evaluation.comparison import Group, compare
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
    """On the instances that both answered, of the first seed that both have."""
    seed: int
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
        seed = _common_seed(left, right)
        if seed is None:
            continue
        found = (
            _on_seen(table, left, right, seed)
            if table.layout.on_seen_tasks
            else _on_unseen(left, right, seed)
        )
        fresh = [
            PairLine(pair, column, found[column], seed[0], None, *_over_seeds(left, right, column))
            for column in table.columns
            if column in found
        ]
        lines += _corrected(fresh)
    return lines


def _common_seed(left: RowValues, right: RowValues) -> tuple[int, int] | None:
    """The first seed that both have, or each one's first; None where a row is empty."""
    if not (left.seeds and right.seeds):
        return None
    both = [seed for seed in left.seeds if seed in right.seeds]
    return (both[0], both[0]) if both else (left.seeds[0], right.seeds[0])


def _on_unseen(left: RowValues, right: RowValues, seeds: tuple[int, int]) -> dict[str, Difference]:
    runs = (read_run(str(right.evaluations[seeds[1]])), read_run(str(left.evaluations[seeds[0]])))
    (comparison,) = compare([Group(run.results.label, (run,)) for run in runs])
    return {line.column: line.difference for line in comparison.lines if line.difference is not None}


def _on_seen(
    table: TableValues, left: RowValues, right: RowValues, seeds: tuple[int, int]
) -> dict[str, Difference]:
    ours, theirs = left.marks[seeds[0]], right.marks[seeds[1]]
    tasks = [task for task in table.titles if task in ours and task in theirs]
    found: dict[str, Difference] = {}
    differences = []
    for task in tasks:
        indices = shared(theirs[task], ours[task], task)
        before, after = pairs(theirs[task], ours[task], indices)
        found[table.titles[task]] = compare_right(before, after)
        differences.append(after - before)
    if len(tasks) == len(table.titles):
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
