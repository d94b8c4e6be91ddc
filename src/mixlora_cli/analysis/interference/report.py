"""`interference.json`, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from mixlora_cli.analysis.interference.files import FORMAT, RESULT
from mixlora_cli.analysis.interference.scores import Scores
from mixlora_cli.errors import cut
from mixlora_cli.store import write_text


def write_result(folder: Path, about: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Write `interference.json` whole; it comes last, so a folder that has it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULT, json.dumps({"format": FORMAT, "about": about, **content}, indent=1) + "\n")


def print_result(
    console: Console,
    label: str,
    content: Mapping[str, Any],
    average: Mapping[str, Mapping[str, Scores]],
    variant: str,
) -> None:
    """Averages over all layers, negative interference with its interval, and warnings about denominators."""
    tasks = content["tasks"]
    for matrix, scores in average.items():
        columns = [Column(task, overflow="fold") for task in tasks]
        title = f"{label}, {matrix}: effect of task j (column) on task i (row), {variant}"
        table = Table("", *columns, title=title)
        for task, row in zip(tasks, scores[variant].value, strict=True):
            table.add_row(cut(task), *(f"{value:.2f}" if np.isfinite(value) else "?" for value in row))
        console.print(table)
    for matrix, by_variant in content["negative"].items():
        for name, found in by_variant.items():
            _say(console, f"negative interference, {matrix}, {name}: {_with_interval(found)}")
    for matrix, found in content["denominators"].items():
        _say(console, _denominators(matrix, found))
    for row in content.get("measured", ()):
        all_steps, same = (
            "?" if row[key] is None else f"{row[key]:.1%}"
            for key in ("relative_error", "relative_error_same_factors")
        )
        _say(
            console,
            f"real steps, {row['matrix']}, lambda={row['lambda']:g}: the estimate is off by {all_steps}; by {same} "
            f"without the {row['rerouted']} of {row['steps']} losses that other factors were selected for",
        )


def print_comparison(
    console: Console, label: str, other: str, compared: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> None:
    """How much negative interference has gone, for each matrix and variant."""
    for matrix, by_variant in compared.items():
        for variant, row in by_variant.items():
            before, after, removed = row["before"], row["after"], row["removed"]
            text = f"{matrix}, {variant}: {other} {_number(before)}, {label} {_number(after)}"
            if removed is None:
                _say(console, f"negative interference, {text}: there was none to remove")
                continue
            ends = row.get("removed_over_batches")
            interval = (
                "" if ends is None else f" (removed, 95 % over batches: {ends[0]:.0%} to {ends[1]:.0%})"
            )
            change = f"{removed:.0%} of it removed" if removed >= 0 else f"{-removed:.0%} more of it"
            _say(console, f"negative interference, {text}: {change}{interval}")


def _denominators(matrix: str, found: Mapping[str, Any]) -> str:
    rows = found["tasks"]
    total = sum(row["total"] for row in rows)
    counts = {key: sum(row[key] for row in rows) for key in ("undefined", "near_zero", "negative")}
    return (
        f"denominators, {matrix}: of {total}, {counts['undefined']} are zero (left out), {counts['near_zero']} near "
        f"zero (cosine below {found['near_zero']:g}, kept), {counts['negative']} negative (kept)"
    )


def _with_interval(found: Mapping[str, Any]) -> str:
    text = f"{_number(found['value'])}"
    if found.get("low") is not None:
        text += f" (95 % over batches: {_number(found['low'])} to {_number(found['high'])})"
    return f"{text}, {found['negative_pairs']} of {found['pairs']} pairs below zero"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
