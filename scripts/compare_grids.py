#!/usr/bin/env python3
"""Does a repeated grid say the same? The cells of Table 1's kind that two folders have in common, pair by pair.

Usage: scripts/compare_grids.py BEFORE AFTER [FIRST LAST]

MME and MMAvg before and after with their paired difference, and the mean loss of the steps FIRST to LAST (201 to 300).
Below: the root mean square of these differences over the trainings, over those of rows with several seeds, and that of
the differences between the seeds of one row. A repetition is as good as seeds let it be where the first two are not the
larger ones. Trainings that are equal to the last digit, in every loss and every answer, are named and left out of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from math import isnan, nan, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from mean_loss import mean_loss

from mixlora_cli.benchmarks.registry import COLUMNS, MEAN_TITLE
from mixlora_cli.evaluation.compare import Line, compare, read_group
from mixlora_cli.evaluation.predictions import FILE_NAME, read_predictions
from mixlora_cli.reproduce.jobs import read_record
from mixlora_cli.training.run_folder import read_metrics

SCORES = (COLUMNS[0], MEAN_TITLE)
DIGITS = {COLUMNS[0]: 0, MEAN_TITLE: 1, "loss": 3}


@dataclass(frozen=True)
class Repeated:
    """One cell in both folders."""

    name: str
    row: str
    """Its experiment."""
    lines: dict[str, Line]
    """MME and MMAvg, the folder before as the first side."""
    losses: tuple[float, float]
    """NaN where nothing was trained."""
    is_same: bool
    """Every logged loss and gradient norm and every answer are the same."""

    @property
    def is_trained(self) -> bool:
        """Whether there is anything of a training to repeat."""
        return not isnan(self.losses[0])

    def values(self, column: str) -> tuple[float, float]:
        """Before and after."""
        if column == "loss":
            return self.losses
        return self.lines[column].first.value, self.lines[column].second.value

    def excludes_zero(self, column: str) -> bool:
        """Whether the interval of the paired difference does."""
        difference = self.lines[column].difference
        return difference is not None and not difference.low <= 0 <= difference.high


def read_repeated(name: str, folders: tuple[Path, Path], first: int, last: int) -> Repeated:
    """Scores from both evaluations, losses from both logs."""
    compared = compare([read_group(str(folder / name / "eval")) for folder in folders])[0]
    logs = [folder / name / "metrics.jsonl" for folder in folders]
    before, after = (mean_loss(log, first, last)[0] if log.is_file() else nan for log in logs)
    row = read_record(folders[0] / name)["experiment"]
    one, other = (content(folder / name) for folder in folders)
    return Repeated(name, row, {line.column: line for line in compared.lines}, (before, after), one == other)


def content(cell: Path) -> tuple[list[Any], list[Any]]:
    """What no clock decides: step, loss and gradient norm of each logged row; every prediction with its place."""
    logged = [
        (row["step"], row["loss"], row.get("grad_norm")) for row in read_metrics(cell / "metrics.jsonl")
    ]
    answered = read_predictions(cell / "eval" / FILE_NAME).predictions
    return logged, sorted((each.key, each.prediction) for each in answered)


def table_row(cell: Repeated) -> str:
    """In Markdown."""
    cells = [cell.name.rpartition("-")[0]]
    for column in SCORES:
        digits, difference = DIGITS[column], cell.lines[column].difference
        assert difference is not None
        ends = f"[{difference.low:.{digits}f}, {difference.high:.{digits}f}]"
        cells += [f"{value:.{digits}f}" for value in cell.values(column)]
        cells.append(f"{difference.value:+.{digits}f} {ends}")
    cells += [f"{loss:.3f}" if cell.is_trained else "-" for loss in cell.losses]
    return f"| {' | '.join(cells)} |"


def summary(column: str, trained: list[Repeated]) -> str:
    """How far repetitions and seeds differ in a column."""
    digits, rows = DIGITS[column], [cell.row for cell in trained]
    replicated = [cell for cell in trained if rows.count(cell.row) > 1]
    seeds = [
        two.values(column)[side] - one.values(column)[side]
        for one, two in combinations(replicated, 2)
        if one.row == two.row
        for side in (0, 1)
    ]
    apart = [root_mean_square(_differences(cells, column)) for cells in (trained, replicated)]
    zero = "" if column == "loss" else f" (zero excluded by {sum(c.excludes_zero(column) for c in trained)})"
    return (
        f"{column}: {apart[0]:.{digits}f} between repetitions{zero}, {apart[1]:.{digits}f} of rows with several seeds; "
        f"{root_mean_square(seeds):.{digits}f} between seeds of one row"
    )


def _differences(cells: Iterable[Repeated], column: str) -> list[float]:
    return [after - before for before, after in (cell.values(column) for cell in cells)]


def root_mean_square(values: list[float]) -> float:
    """NaN of none."""
    return sqrt(fmean(value**2 for value in values)) if values else nan


def main(before: Path, after: Path, first: int = 201, last: int = 300) -> None:
    """Print the table, what follows from it, and what could not be compared."""
    names = [{path.parent.name for path in folder.glob("*-seed*/eval")} for folder in (before, after)]
    shared = sorted(names[0] & names[1])
    if not shared:
        raise SystemExit(f"{before} and {after} have no evaluated cell in common: other configurations?")
    cells = [read_repeated(name, (before, after), first, last) for name in shared]
    print("| cell | MME | again | difference | MMAvg | again | difference | loss | again |")
    print("| --- | ---: | ---: | --- | ---: | ---: | --- | ---: | ---: |")
    print("\n".join(map(table_row, cells)))
    trained = [cell for cell in cells if cell.is_trained]
    same = [cell.name.rpartition("-")[0] for cell in trained if cell.is_same]
    others = [cell for cell in trained if not cell.is_same]
    print(f"\n{len(shared)} cells, {len(trained)} of them trained.")
    print(f"The same to the last digit: {', '.join(same) or 'none'}.")
    if others:
        print(f"Root mean squares of differences, the other {len(others)}:")
        print("\n".join(f"- {summary(column, others)}" for column in DIGITS))
    print(
        f"\nLeft out: {len(names[0] - names[1])} in {before} alone, {len(names[1] - names[0])} in {after} alone."
    )


if __name__ == "__main__":
    if len(sys.argv) not in (3, 5) or not all(step.isdecimal() for step in sys.argv[3:]):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
