#!/usr/bin/env python3
"""Does a repeated grid say the same? The cells of Table 1's kind that two folders have in common, pair by pair.

Usage: scripts/compare_grids.py BEFORE AFTER [FIRST LAST]

MME and MMAvg before and after with their paired difference, and the mean loss of the steps FIRST to LAST (201 to 300).
Below: the root mean square of these differences, and that of the differences between trainings of one row with
different seeds. A repetition is as good as it can be where the former is not the larger one.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from itertools import combinations
from math import isnan, nan, sqrt
from pathlib import Path
from statistics import fmean

from mean_loss import mean_loss

from mixlora_cli.evaluation.benchmarks import COLUMNS, MEAN_TITLE
from mixlora_cli.evaluation.comparison import Line, compare, read_group

DIGITS = {COLUMNS[0]: 0, MEAN_TITLE: 1, "loss": 3}
SCORES = (COLUMNS[0], MEAN_TITLE)


def compared(before: Path, after: Path) -> dict[str, Line]:
    """The columns of two cells, side by side."""
    groups = [read_group(str(cell / "eval")) for cell in (before, after)]
    return {line.column: line for line in compare(groups)[0].lines}


def loss_of(cell: Path, first: int, last: int) -> float:
    """NaN where nothing was trained."""
    path = cell / "metrics.jsonl"
    return mean_loss(path, first, last)[0] if path.is_file() else nan


def root_mean_square(values: list[float]) -> float:
    """Of those that are numbers; NaN of none."""
    numbers = [value**2 for value in values if not isnan(value)]
    return sqrt(fmean(numbers)) if numbers else nan


def shown(line: Line) -> str:
    """Three cells of the table: both scores and their difference."""
    digits, found = DIGITS[line.column], line.difference
    assert found is not None
    ends = f"[{found.interval.low:.{digits}f}, {found.interval.high:.{digits}f}]"
    values = (f"{side.value:.{digits}f}" for side in (line.first, line.second))
    return " | ".join([*values, f"{found.value:+.{digits}f} {ends}"])


def main(before: Path, after: Path, first: int = 201, last: int = 300) -> None:
    """Print the table and what follows from it."""
    names = sorted(path.name for path in before.glob("*-seed*") if (after / path.name / "eval").is_dir())
    repeated: dict[str, list[float]] = defaultdict(list)
    excluded: dict[str, int] = defaultdict(int)
    trainings: dict[tuple[Path, str], list[dict[str, float]]] = defaultdict(list)
    print("| cell | MME | again | difference | MMAvg | again | difference | loss | again |")
    print("| --- | ---: | ---: | --- | ---: | ---: | --- | ---: | ---: |")
    for name in names:
        lines = compared(before / name, after / name)
        losses = {folder: loss_of(folder / name, first, last) for folder in (before, after)}
        for column in SCORES:
            found = lines[column].difference
            assert found is not None
            repeated[column].append(found.value)
            excluded[column] += not found.interval.low <= 0 <= found.interval.high
        repeated["loss"].append(losses[after] - losses[before])
        row = re.sub(r"-seed\d+-.*", "", name)
        trainings[before, row].append({column: lines[column].first.value for column in SCORES})
        trainings[after, row].append({column: lines[column].second.value for column in SCORES})
        for folder in (before, after):
            trainings[folder, row][-1]["loss"] = losses[folder]
        both = ("-" if isnan(loss) else f"{loss:.3f}" for loss in losses.values())
        print(
            "|", " | ".join([name.rpartition("-")[0], *(shown(lines[each]) for each in SCORES), *both]), "|"
        )
    print(f"\n{len(names)} cells.")
    for column, digits in DIGITS.items():
        seeds = [b[column] - a[column] for row in trainings.values() for a, b in combinations(row, 2)]
        note = f" ({excluded[column]} intervals exclude zero)" if column in excluded else ""
        print(
            f"{column}: {root_mean_square(repeated[column]):.{digits}f} between repetitions{note}, "
            f"{root_mean_square(seeds):.{digits}f} between seeds of one row"
        )


if __name__ == "__main__":
    if len(sys.argv) not in (3, 5):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
