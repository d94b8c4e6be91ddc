"""The pictures: maps, use of factors and overlap of tasks, as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mixlora_cli.analysis.selections.atlas import Atlas, Panel
from mixlora_cli.analysis.selections.palette import in_legend_order
from mixlora_cli.analysis.selections.separation import Measured

_Inches = tuple[float, float]
_SHAPES = {"circle": "o", "triangle": "^", "square": "s", "diamond": "D"}
_LEGEND_COLUMNS = 5
_WRITTEN_OUT = 10
"""Tables of at most so many tasks get their numbers written into the cells."""


def draw_all(atlas: Atlas, pairs: Sequence[Sequence[str]] | None, folder: Path, heading: str) -> list[Path]:
    """Write map, use and overlap into `folder`, PNG and SVG of each."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context({"svg.hashsalt": "mixlora", "font.size": 9, "axes.titlesize": 9}):
        return [
            *_draw_map(atlas, pairs, folder, heading),
            *_draw_use(atlas, folder, heading),
            *_draw_overlap(atlas, folder, heading),
        ]


@contextmanager
def _figure(
    atlas: Atlas, panel: _Inches, around: _Inches, folder: Path, name: str, made: list[Path]
) -> Iterator[Any]:
    """A grid with a row for each side and a column for each layer, and space for names and titles around it;
    written when the block ends.
    """
    from matplotlib import pyplot

    rows = len({one.side for one in atlas.panels})
    columns = len(atlas.panels) // rows
    size = (around[0] + panel[0] * columns, around[1] + panel[1] * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    yield figure, axes
    folder.mkdir(parents=True, exist_ok=True)
    made += [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(made[-2], dpi=160)
    figure.savefig(made[-1], metadata={"Date": None})
    pyplot.close(figure)


def _draw_map(atlas: Atlas, pairs: Sequence[Sequence[str]] | None, folder: Path, heading: str) -> list[Path]:
    from matplotlib.lines import Line2D

    made: list[Path] = []
    with _figure(atlas, (3.5, 3.75), (0, 0.9), folder, "map", made) as (figure, axes):
        for panel, place in zip(atlas.panels, axes.flat, strict=True):
            _scatter(atlas, panel, place)
        names = in_legend_order([one.task for one in atlas.tasks], pairs)
        splits = {one.task: one.split for one in atlas.tasks}
        handles = [
            Line2D(
                [],
                [],
                linestyle="",
                marker=_SHAPES[atlas.styles[name].marker],
                color=atlas.styles[name].colour,
                label=f"{name} ({_kind(splits[name])})" if len(set(splits.values())) > 1 else name,
            )
            for name in names
        ]
        most = min(_LEGEND_COLUMNS, 2 * axes.shape[1])
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=_columns(len(names) if pairs is None else len(pairs), most),
            frameon=False,
            markerscale=1.2,
        )
        figure.suptitle(
            f"{heading}\nt-SNE of selected factors, Jaccard distance, perplexity {atlas.perplexity:.3g}; "
            "identical selections spread over a disc",
            fontsize=10,
        )
    return made


def _columns(count: int, most: int) -> int:
    """Columns of a legend that has as few rows as it can, and these as even as they can be."""
    return math.ceil(count / math.ceil(count / most))


def _scatter(atlas: Atlas, panel: Panel, axes: Any) -> None:
    size = float(np.clip(9000 / len(atlas.labels), 2.5, 24))
    # In a seeded order, so that no task lies on top of all others.
    order = np.random.default_rng(0).permutation(len(atlas.labels))
    styles = [atlas.styles[one.task] for one in atlas.tasks]
    for marker in dict.fromkeys(style.marker for style in styles):
        mine = [place for place in order if styles[atlas.labels[place]].marker == marker]
        axes.scatter(
            *panel.points[mine].T,
            s=size,
            c=[styles[atlas.labels[place]].colour for place in mine],
            marker=_SHAPES[marker],
            linewidths=0,
        )
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_color("0.75")
    found = panel.separation
    axes.set_title(f"{panel.title}: {len(panel.space.vectors)} selections of {len(atlas.labels)} instances")
    axes.set_xlabel(
        f"silhouette {_beside_chance(found.silhouette)}\nneighbour purity {_beside_chance(found.purity)}\n"
        f"mutual information {_beside_chance(found.information)}"
    )


def _draw_use(atlas: Atlas, folder: Path, heading: str) -> list[Path]:
    made: list[Path] = []
    num_factors = atlas.panels[0].use.shape[1]
    size = (0.5 + 0.17 * num_factors, 0.5 + 0.26 * len(atlas.tasks))
    with _figure(atlas, size, (_room(atlas) + 1, 0.8), folder, "use", made) as (figure, axes):
        image = None
        for panel, place in zip(atlas.panels, axes.flat, strict=True):
            image = place.imshow(panel.use, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            place.set_title(panel.title)
            place.set_xticks(range(0, num_factors, max(1, num_factors // 8)))
            place.tick_params(length=2)
        _name_rows(atlas, axes)
        for place in axes[-1]:
            place.set_xlabel("factor")
        figure.colorbar(image, ax=axes, label="share of the task's\ninstances", shrink=0.9, aspect=30)
        figure.suptitle(f"{heading}\nuse of the factors", fontsize=10)
    return made


def _draw_overlap(atlas: Atlas, folder: Path, heading: str) -> list[Path]:
    made: list[Path] = []
    names = [one.task for one in atlas.tasks]
    side = max(1.8, 0.4 * len(names))
    around = (_room(atlas) + 1, _room(atlas) + 0.6)
    with _figure(atlas, (side + 0.2, side + 0.3), around, folder, "overlap", made) as (figure, axes):
        image = None
        for panel, place in zip(atlas.panels, axes.flat, strict=True):
            image = place.imshow(panel.overlap, vmin=0, vmax=1, cmap="viridis")
            place.set_title(panel.title)
            place.set_xticks([])
            if len(names) <= _WRITTEN_OUT:
                for (row, column), value in np.ndenumerate(panel.overlap):
                    colour = "white" if value < 0.6 else "black"
                    shown = f"{value:.2f}".lstrip("0")
                    place.text(column, row, shown, ha="center", va="center", color=colour, fontsize=7)
        _name_rows(atlas, axes)
        for place in axes[-1]:
            place.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        figure.colorbar(image, ax=axes, label="overlap (1 = the same use)", shrink=0.9, aspect=30)
        figure.suptitle(f"{heading}\noverlap of the factors that two tasks use", fontsize=10)
    return made


def _room(atlas: Atlas) -> float:
    """Inches that the longest task name takes."""
    return 0.075 * max(len(one.task) for one in atlas.tasks)


def _name_rows(atlas: Atlas, axes: Any) -> None:
    for row in axes:
        for place in row:
            place.set_yticks([])
        row[0].set_yticks(range(len(atlas.tasks)), [one.task for one in atlas.tasks])


def _beside_chance(measured: Measured) -> str:
    return f"{measured.value:.2f} (chance {measured.low:.2f} to {measured.high:.2f})".replace("-", "\u2212")


def _kind(split: str) -> str:
    return "seen" if split == "heldout" else "unseen"
