"""Comparisons of runs as tables for a terminal and as Markdown, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixlora_cli.evaluation.comparison import Comparison, Group, Line
from mixlora_cli.evaluation.table import FILE_WIDTH, MISSING
from mixlora_cli.stats import Difference, Estimate

FORMAT = "mixlora-comparison/1"
CAPTION = (
    "Difference: second minus first, [95 % interval]. p: two-sided; p (Holm): corrected for the number of benchmarks. "
    "n: instances that all answered, which are those that both sides and the difference are of; where some answered "
    "more, it says of how many."
)
HEADINGS = ("", "first", "second", "difference", "p", "p (Holm)", "test", "n")


def _number(value: float, unit: str) -> str:
    return f"{value:.0f}" if unit == "points" else f"{value:.1f}"


def _signed(value: float, unit: str) -> str:
    return f"{'+' if value > 0 else ''}{_number(value, unit)}"


def _count(line: Line) -> str:
    """`30`, or `30 of 40` where each side answered 40, or `30 of 40 and 35`."""
    first, second = line.answered
    if line.n == first == second:
        return str(line.n)
    return f"{line.n} of {first}" if first == second else f"{line.n} of {first} and {second}"


def _side(side: Estimate, unit: str, runs: int) -> str:
    assert side.value is not None
    if side.low is None:  # of several runs: all have the same value
        return _number(side.value, unit) + (f" [{MISSING}]" if runs > 1 else "")
    return f"{_number(side.value, unit)} {_interval(side, unit)}"


def _interval(interval: Estimate | Difference, unit: str) -> str:
    assert interval.low is not None
    assert interval.high is not None
    return f"[{_number(interval.low, unit)}, {_number(interval.high, unit)}]"


def _p(value: float | None) -> str:
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def cells(line: Line) -> list[str]:
    """One row of the table, in the order of `HEADINGS`."""
    sides = [
        _side(side, line.unit, runs) for side, runs in zip((line.first, line.second), line.runs, strict=True)
    ]
    found = line.difference
    if found is None:
        assert line.first.value is not None
        assert line.second.value is not None
        value = _signed(line.second.value - line.first.value, line.unit)
        return [line.column, *sides, value, MISSING, MISSING, line.untested, _count(line)]
    difference = f"{_signed(found.value, line.unit)} {_interval(found, line.unit)}"
    return [line.column, *sides, difference, _p(found.p), _p(line.p_holm), found.test, _count(line)]


def title_of(comparison: Comparison) -> str:
    """What is compared."""
    return f"first: {comparison.first.label}; second: {comparison.second.label}"


def print_comparisons(comparisons: Sequence[Comparison], console: Console | None = None) -> None:
    """A table for each pair."""
    console = console or Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    for comparison in comparisons:
        table = Table(
            title=Text(title_of(comparison)),
            caption=CAPTION,
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading in ("", "test") else "right")
        for line in comparison.lines:
            table.add_row(*map(Text, cells(line)))
        console.print(table)


def markdown(comparisons: Sequence[Comparison]) -> str:
    """The same as Markdown."""
    parts = []
    for comparison in comparisons:
        rows = [HEADINGS, ["---", *["---:"] * (len(HEADINGS) - 1)], *map(cells, comparison.lines)]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts.append(f"{title_of(comparison)}\n\n{table}\n")
    return "\n".join([*parts, f"{CAPTION}\n"])


def as_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """{"format", "comparisons": [{"first", "second", "lines"}]}: `Line`'s fields, intervals as [low, high]."""
    return {
        "format": FORMAT,
        "comparisons": [
            {
                "first": _group_json(comparison.first),
                "second": _group_json(comparison.second),
                "lines": [_line_json(line) for line in comparison.lines],
            }
            for comparison in comparisons
        ],
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {"label": group.label, "runs": [run.name for run in group.runs]}


def _interval_json(interval: Estimate | Difference) -> list[float | None] | None:
    return None if interval.low is None else [interval.low, interval.high]


def _line_json(line: Line) -> dict[str, Any]:
    sides = {
        name: {"value": side.value, "interval": _interval_json(side), "runs": runs}
        for name, side, runs in zip(("first", "second"), (line.first, line.second), line.runs, strict=True)
    }
    found = line.difference
    difference = found and {
        "value": found.value,
        "interval": _interval_json(found),
        "p": found.p,
        "p_holm": line.p_holm,
        "test": found.test,
    }
    counts = {"n": line.n, "answered": list(line.answered)}
    return {
        "column": line.column,
        "unit": line.unit,
        **counts,
        **sides,
        "difference": difference,
        "untested": line.untested or None,
    }


def write_comparisons(comparisons: Sequence[Comparison], folder: Path) -> None:
    """Write compare.json and compare.md into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(comparisons), indent=2, ensure_ascii=False)
    (folder / "compare.json").write_text(text + "\n", encoding="utf-8")
    (folder / "compare.md").write_text(markdown(comparisons), encoding="utf-8")
