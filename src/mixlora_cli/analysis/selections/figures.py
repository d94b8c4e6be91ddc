"""The pictures: maps, use of factors and overlap of tasks, as PNG and SVG; pairs of tasks share a hue."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mixlora_cli import plots
from mixlora_cli.analysis.selections.maps import Floats, Map, Maps

Marker = Literal["circle", "triangle", "square", "diamond"]
Pairs = Sequence[Sequence[str]] | None
_SHAPES: dict[Marker, str] = {"circle": "o", "triangle": "^", "square": "s", "diamond": "D"}
_PALE = 0.5
"""Share of white in an unseen partner's colour."""
_LEGEND_COLUMNS = 5
_WRITTEN_OUT = 10
"""Tables of at most so many tasks get their numbers written into the cells."""


@dataclass(frozen=True)
class Style:
    """How a task's instances are drawn."""

    colour: str
    """#rrggbb."""
    marker: Marker = "circle"


def styles_of(tasks: Sequence[str], pairs: Pairs) -> dict[str, Style]:
    """By task: one hue each, markers change when the hues begin again; of a pair, both take the hue of its seen task,
    which is dark and round, and the unseen one is pale and a triangle.
    """
    hues, markers = plots.HUES, list(_SHAPES)
    if pairs is None:
        return {
            task: Style(hues[number % len(hues)], markers[number // len(hues) % len(markers)])
            for number, task in enumerate(tasks)
        }
    seen = {
        task: Style(hues[number % len(hues)])
        for number, task in enumerate(dict.fromkeys(p[0] for p in pairs))
    }
    unseen = {pair[1]: Style(_pale(seen[pair[0]].colour), "triangle") for pair in reversed(pairs)}
    return unseen | seen


def _pale(colour: str) -> str:
    channels = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(value + (255 - value) * _PALE):02x}" for value in channels)


def in_legend_order(tasks: Sequence[str], pairs: Pairs) -> list[str]:
    """Tasks as a legend filled column by column wants them: each seen task above its unseen partner."""
    return list(dict.fromkeys(tasks if pairs is None else (task for pair in pairs for task in pair)))


def draw_all(maps: Maps, styles: Mapping[str, Style], pairs: Pairs, folder: Path, heading: str) -> None:
    """Write map, use and overlap into `folder`, PNG and SVG of each."""
    _draw_map(maps, styles, pairs, folder, heading)
    _draw_use(maps, folder, heading)
    _draw_overlap(maps, folder, heading)


def _figure(
    maps: Maps, panel: tuple[float, float], around: tuple[float, float], path: Path
) -> AbstractContextManager[tuple[Any, Any]]:
    """A row for each side and a column for each layer, and space for names and titles around it; in inches."""
    rows = len({one.side for one in maps.each})
    columns = len(maps.each) // rows
    size = (around[0] + panel[0] * columns, around[1] + panel[1] * rows)
    return plots.figure(
        [path.with_suffix(".png"), path.with_suffix(".svg")], rows, columns, dpi=160, figsize=size
    )


def _draw_map(maps: Maps, styles: Mapping[str, Style], pairs: Pairs, folder: Path, heading: str) -> None:
    from matplotlib.lines import Line2D

    with _figure(maps, (3.5, 3.75), (0, 0.9), folder / "map") as (figure, axes):
        for one, place in zip(maps.each, axes.flat, strict=True):
            _scatter(maps, one, styles, place)
        names = in_legend_order(maps.names, pairs)
        kinds = {one.task: "seen" if one.split == "heldout" else "unseen" for one in maps.tasks}
        handles = [
            Line2D(
                [],
                [],
                linestyle="",
                marker=_SHAPES[styles[name].marker],
                color=styles[name].colour,
                label=f"{name} ({kinds[name]})" if len(set(kinds.values())) > 1 else name,
            )
            for name in names
        ]
        # As few rows as there can be, and these as even as they can be.
        most, count = min(_LEGEND_COLUMNS, 2 * axes.shape[1]), len(names) if pairs is None else len(pairs)
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=math.ceil(count / math.ceil(count / most)),
            frameon=False,
            markerscale=1.2,
        )
        figure.suptitle(
            f"{heading}\nt-SNE of selected factors, Jaccard distance, perplexity {maps.perplexity:.3g}; "
            "identical selections spread over a disc",
            fontsize=10,
        )


def _scatter(maps: Maps, one: Map, styles: Mapping[str, Style], axes: Any) -> None:
    size = float(np.clip(9000 / len(maps.labels), 2.5, 24))
    # In a seeded order, so that no task lies on top of all others.
    order = np.random.default_rng(0).permutation(len(maps.labels))
    of_task = [styles[name] for name in maps.names]
    for marker in dict.fromkeys(style.marker for style in of_task):
        mine = [place for place in order if of_task[maps.labels[place]].marker == marker]
        axes.scatter(
            *one.points[mine].T,
            s=size,
            c=[of_task[maps.labels[place]].colour for place in mine],
            marker=_SHAPES[marker],
            linewidths=0,
        )
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_color("0.75")
    title = f"{one.title}: {len(one.space.vectors)} selections of {len(maps.labels)} instances"
    axes.set_title(title, fontsize=9)
    lines = [
        f"{name} {found.value:.2f} (chance {found.low:.2f} to {found.high:.2f})".replace("-", "\u2212")
        for name, found in one.separation.items()
    ]
    axes.set_xlabel("\n".join(lines))


def _draw_use(maps: Maps, folder: Path, heading: str) -> None:
    num_factors = maps.each[0].use.shape[1]
    size = (0.5 + 0.17 * num_factors, 0.5 + 0.26 * len(maps.tasks))
    with _figure(maps, size, (_room(maps) + 1, 0.8), folder / "use") as (figure, axes):
        tables = [one.use for one in maps.each]
        _heatmaps(maps, tables, figure, axes, "share of the task's\ninstances", cmap="Blues", aspect="auto")
        for place in axes.flat:
            place.set_xticks(range(0, num_factors, max(1, num_factors // 8)))
            place.tick_params(length=2)
        for place in axes[-1]:
            place.set_xlabel("factor")
        figure.suptitle(f"{heading}\nuse of the factors", fontsize=10)


def _draw_overlap(maps: Maps, folder: Path, heading: str) -> None:
    names = maps.names
    side = max(1.8, 0.4 * len(names))
    around = (_room(maps) + 1, _room(maps) + 0.6)
    with _figure(maps, (side + 0.2, side + 0.3), around, folder / "overlap") as (figure, axes):
        tables = [one.overlap for one in maps.each]
        _heatmaps(maps, tables, figure, axes, "overlap (1 = the same use)", cmap="viridis")
        for table, place in zip(tables if len(names) <= _WRITTEN_OUT else (), axes.flat, strict=False):
            for (row, column), value in np.ndenumerate(table):
                colour = "white" if value < 0.6 else "black"
                shown = f"{value:.2f}".lstrip("0")
                place.text(column, row, shown, ha="center", va="center", color=colour, fontsize=7)
        for place in axes[-1]:
            place.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        figure.suptitle(f"{heading}\noverlap of the factors that two tasks use", fontsize=10)


def _heatmaps(
    maps: Maps, tables: Sequence[Floats], figure: Any, axes: Any, label: str, **options: Any
) -> None:
    """A table (tasks, columns) of numbers from 0 to 1 for each map; tasks are named at the left."""
    for one, table, place in zip(maps.each, tables, axes.flat, strict=True):
        image = place.imshow(table, vmin=0, vmax=1, **options)
        place.set(xticks=[], yticks=[])
        place.set_title(one.title, fontsize=9)
    for row in axes:
        row[0].set_yticks(range(len(maps.tasks)), maps.names)
    figure.colorbar(image, ax=axes, label=label, shrink=0.9, aspect=30)


def _room(maps: Maps) -> float:
    """Inches that the longest task name takes."""
    return 0.075 * max(map(len, maps.names))
