"""Heatmaps of interference: chosen layers like Figure 2, averages like Figure 7, one adapter or two side by side."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixlora_cli import plots
from mixlora_cli.analysis.interference.files import Stored
from mixlora_cli.analysis.interference.gradients import MATRICES, Floats
from mixlora_cli.analysis.interference.scores import Measurement, score
from mixlora_cli.config import DrawConfig, Variant
from mixlora_cli.errors import UserError

_CELL, _LABEL, _TITLE, _BAR = 0.52, 1.25, 0.55, 1.1  # inches
_QUANTILE = 95  # of all cells: what is beyond gets the last colour, and its number
_NAMES = {
    "mean": "mean of ratios (Eq. 3)",
    "median": "median of ratios",
    "ratio_of_means": "ratio of means",
    "cosine": "cosine of mean unit gradients",
}
_BLOCKS = {"mlp": "MLP", "attention": "self-attention", "other": "other"}


Heatmap = tuple[str, Floats]
"""Title of one panel, and (T, T) what task j (column) does to task i (row)."""


def draw_all(found: Sequence[Stored], folder: Path, settings: DrawConfig) -> None:
    """Write the figures of one measurement, or of two (the one that is compared with first), as PNG and SVG.

    Raises:
        UserError: `draw.layers` names a layer that was not measured.
    """
    prefix = "compare_" if len(found) > 1 else ""
    tasks, variant = found[0].measurement.tasks, settings.score
    _draw(_averages(found, variant), tasks, variant, folder / f"{prefix}average")
    if layers := _by_layer(found, settings):
        _draw(layers, tasks, variant, folder / f"{prefix}layers")


def choose_layers(measurement: Measurement, wanted: Sequence[int] | None) -> list[int]:
    """Transformer layers to draw: those wanted, or the middle ones of the first, middle and last third.

    Raises:
        UserError: a wanted layer was not measured.
    """
    known = sorted({group.number for group in measurement.groups if group.number is not None})
    if wanted is None:
        thirds = [part for part in np.array_split(np.array(known, dtype=int), 3) if len(part)]
        return [int(part[len(part) // 2]) for part in thirds]
    for layer in wanted:
        if layer not in known:
            shown = f"{known[0]} to {known[-1]}" if known else "none"
            raise UserError(f"draw.layers={layer}: this adapter has no such layer; its layers are {shown}")
    return list(dict.fromkeys(wanted))


def _averages(found: Sequence[Stored], variant: Variant) -> list[list[Heatmap]]:
    """Figure 7: a row of panels for A and one for B with two adapters, else one row."""
    rows = [
        [
            (f"{one.label}\nmatrix {matrix}, all layers", score(part, variant).value)
            for one in found
            for part in [one.measurement.of(matrix=matrix)]
        ]
        for matrix in MATRICES
    ]
    return rows if len(found) > 1 else [[panel for row in rows for panel in row]]


def _by_layer(found: Sequence[Stored], settings: DrawConfig) -> list[list[Heatmap]]:
    """Figure 2: a row for each block of each adapter, in it A and B of each chosen layer."""
    layers = choose_layers(found[0].measurement, settings.layers)
    rows = []
    for block, name in _BLOCKS.items():
        for one in found:
            row = []
            for matrix in MATRICES:
                for layer in layers:
                    part = one.measurement.of(block=block, number=layer, matrix=matrix)
                    title = f"{one.label}\n{name} of layer {layer}, {matrix}"
                    if part.groups:
                        row.append((title, score(part, settings.score).value))
            if row:
                rows.append(row)
    return rows


def _draw(rows: Sequence[Sequence[Heatmap]], tasks: Sequence[str], variant: Variant, path: Path) -> None:
    side = _CELL * len(tasks)
    columns = max(len(row) for row in rows)
    width = _LABEL + columns * (side + 0.3) + _BAR
    height = len(rows) * (side + _TITLE) + _LABEL + 0.6
    limit = _end_of_scale([panel for row in rows for panel in row])
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    with plots.figure(paths, len(rows), columns, figsize=(max(width, 6.5), height)) as (figure, axes):
        image: Any = None
        for r, row in enumerate(rows):
            for c in range(columns):
                if c >= len(row):
                    axes[r][c].set_visible(False)
                    continue
                image = _heatmap(axes[r][c], row[c], tasks, limit, first=c == 0, last=r == len(rows) - 1)
        figure.supxlabel("task j, which is learnt", fontsize=10)
        figure.supylabel("task i, which feels it", fontsize=10)
        bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.7, pad=0.02, aspect=30)
        bar.set_label(
            f"interference of j on i, {_NAMES[variant]}\nblue: harms, red: helps; diagonal: 1 by construction"
        )


def _end_of_scale(panels: Sequence[Heatmap]) -> float:
    """Where the colours of all panels end: almost all cells off the diagonals are within."""
    cells = np.concatenate([values[~np.eye(len(values), dtype=bool)] for _, values in panels])
    cells = np.abs(cells[np.isfinite(cells)])
    return max(float(np.percentile(cells, _QUANTILE)) if len(cells) else 0.0, 1e-6)


def _heatmap(axes: Any, panel: Heatmap, tasks: Sequence[str], limit: float, first: bool, last: bool) -> Any:
    """One panel; its diagonal is grey, because it says nothing."""
    title, values = panel
    shown = np.where(np.eye(len(tasks), dtype=bool), np.nan, values)
    axes.set_facecolor("0.85")
    image = axes.imshow(shown, cmap=plots.DIVERGING, vmin=-limit, vmax=limit)
    for (i, j), value in np.ndenumerate(values):
        if i != j:
            strong = np.isfinite(value) and abs(value) > 0.6 * limit
            colour = "white" if strong else "0.1"
            axes.text(j, i, _short(value), ha="center", va="center", fontsize=7, color=colour)
    labels = [_in_lines(task) for task in tasks]
    axes.set_xticks(range(len(tasks)), labels if last else [], rotation=90, fontsize=8)
    axes.set_yticks(range(len(tasks)), labels if first else [], fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=9)
    axes.spines[:].set_visible(False)
    return image


def _in_lines(task: str) -> str:
    """A task's name over several lines, broken where its words end; underscores read as spaces."""
    words = re.sub(r"_+", " ", task.replace("+", ": ")).strip()
    return "\n".join(textwrap.wrap(words, 16, break_long_words=True)) or task


def _short(value: float) -> str:
    """At most five characters: "-0.12", "12.3", "-1e3"."""
    if not np.isfinite(value):
        return "?"
    size = abs(value)
    if size >= 1000:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    value = 0.0 if size < 0.005 else value  # no "-0.00"
    return f"{value:.2f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:.0f}"
