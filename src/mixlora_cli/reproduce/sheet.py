"""A table as text: headings, rows and notes, the same for the screen, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixlora_cli.reproduce.build import RowValues, TableValues
from mixlora_cli.reproduce.differences import PairLine
from mixlora_cli.reproduce.layout import ABSENT, Scale
from mixlora_cli.reproduce.paper import published
from mixlora_cli.reproduce.values import Value
from mixlora_cli.stats import Difference

UNITS = "MME in points, the rest in per cent; [...]: 95 % interval"
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Cell:
    """What stands in one place: the number, its interval, and what is said beside it; the latter two may be empty."""

    value: str
    interval: str = ""
    beside: str = ""

    def joined(self, between: str) -> str:
        """All of it, with `between` where a line could break."""
        return between.join(part for part in (self.value, self.interval, self.beside) if part)


@dataclass(frozen=True)
class Sheet:
    """A table that is ready to be written."""

    title: str
    headings: tuple[str, ...]
    num_labels: int
    """How many of the columns hold words, the first ones."""
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]


def values_sheet(table: TableValues, scale: Scale) -> Sheet:
    """The paper's table with our numbers."""
    layout = table.layout
    rows = tuple(
        (
            *(Cell(label) for label in each.row.labels),
            *(_value_cell(table, each, column, scale) for column in table.columns),
        )
        for each in table.rows
    )
    return Sheet(
        f"{layout.title} (scale: {scale})",
        (*layout.headings, *table.columns),
        len(layout.headings),
        rows,
        (_reading(table, scale), *table.notes),
    )


def _reading(table: TableValues, scale: Scale) -> str:
    several = [each for each in table.rows if len(each.seeds) > 1]
    over = " over instances"
    if several:
        seeds = "; ".join(f"{each.row.title}: {', '.join(map(str, each.seeds))}" for each in several)
        over = f" over instances; ±: mean of several seeds and interval over them ({seeds})"
    beside = "; p: the paper's number" if scale == "paper" else ""
    same = any(value.low is None for each in table.rows for value in each.values.values())
    if same:
        over += f"; [{ABSENT}]: the same in every seed, no spread to make an interval of"
    return f"{UNITS}{over}{beside}."


def _value_cell(table: TableValues, row: RowValues, column: str, scale: Scale) -> Cell:
    digits = digits_of(column)
    number = published(table.layout.name, row.row.experiment, column) if scale == "paper" else None
    beside = "" if number is None else f"p {number:.2f}"
    value = row.values.get(column)
    if value is None:
        return Cell(ABSENT, "", beside)
    mark = "±" if value.runs > 1 else ""
    return Cell(f"{value.value:.{digits}f}{mark}", interval_text(value, digits), beside)


def interval_text(value: Value, digits: int) -> str:
    """`[61.2, 66.9]`; `[-]` where several trainings have the same value, which says nothing about their spread."""
    if value.low is None or value.high is None:
        return f"[{ABSENT}]"
    return f"[{value.low:.{digits}f}, {value.high:.{digits}f}]"


def digits_of(column: str) -> int:
    """Decimals: none for points."""
    return 0 if column == "MME" else 1


def differences_sheet(table: TableValues, lines: Sequence[PairLine]) -> Sheet:
    """Differences of the layout's pairs; a second row where both sides have several seeds."""
    rows: list[tuple[Cell, ...]] = []
    for pair in table.layout.pairs:
        found = {line.column: line for line in lines if line.pair == pair}
        if not found:
            continue
        seeds = max((line.paired_seeds for line in found.values()), key=len)
        head = f"{table.layout.row(pair.left).title} - {table.layout.row(pair.right).title}"
        paired = [_difference_cell(found.get(column), column, seeds) for column in table.columns]
        rows.append((Cell(head), Cell(pair.why), Cell(f"{seeds_text(seeds)}, paired"), *paired))
        if any(line.seeds or line.untested for line in found.values()):
            over = [_seeds_cell(found.get(column), column) for column in table.columns]
            rows.append((Cell(head), Cell(pair.why), Cell("means over seeds"), *over))
    return Sheet(
        "Differences",
        ("Left - right", "With", "By", *table.columns),
        3,
        tuple(rows),
        (
            "Paired: on the same instances, the mean over the seeds; McNemar's exact test for right or wrong, over "
            "several seeds an exact test by flipping signs; a paired bootstrap for MME, Text-VQA, means. About other "
            "instances, for these trainings. Over seeds: Welch's t; about other trainings, on these instances. p is "
            "not corrected; *: below 0.05 after Holm's correction over the benchmarks of a line.",
        ),
    )


def seeds_text(seeds: Sequence[int]) -> str:
    """`seed 0` or `seeds 0, 1, 2`."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _difference_cell(line: PairLine | None, column: str, usual: Sequence[int]) -> Cell:
    """Says of which seeds it is where those are not the row's."""
    if line is None:
        return Cell(ABSENT)
    cell = _cell(line.paired, column, "*" if line.p_holm is not None and line.p_holm < SIGNIFICANCE else "")
    if line.paired_seeds == usual:
        return cell
    return replace(cell, beside=f"{cell.beside} ({seeds_text(line.paired_seeds)})")


def _seeds_cell(line: PairLine | None, column: str) -> Cell:
    if line is None:
        return Cell(ABSENT)
    return Cell(ABSENT, "", line.untested) if line.seeds is None else _cell(line.seeds, column, "")


def _cell(difference: Difference, column: str, star: str) -> Cell:
    digits = digits_of(column)
    low, high = difference.low, difference.high
    p = "p<0.001" if difference.p < 0.001 else f"p={difference.p:.3f}"
    value = round(difference.value, digits) + 0.0  # no "-0.0"
    return Cell(f"{value:+.{digits}f}{star}", f"[{low:.{digits}f}, {high:.{digits}f}]", p)
