"""Figure 4: MMAvg with and without conditional factor selection, as bars with their intervals."""

from __future__ import annotations

import math
from pathlib import Path

from mixlora_cli.benchmarks.registry import MEAN_TITLE
from mixlora_cli.reproduce.build import TableValues
from mixlora_cli.reproduce.values import Value

WITH, WITHOUT = "#1f5a94", "#d99a3c"  # told apart in grey, too
_WIDTH = 0.36


def draw(table: TableValues, folder: Path) -> list[Path]:
    """PNG and SVG; settings without a number leave a gap that says so."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(row.row.labels[1:3] for row in table.rows))
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    highs = []
    for side, (cfs, colour) in enumerate((("with", WITH), ("without", WITHOUT))):
        values = [_value(table, size, cfs) for size in sizes]
        places = [place + (side - 0.5) * _WIDTH for place in range(len(sizes))]
        known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        errors = [_errors(value) for _, value in known]
        axes.bar(
            [place for place, _ in known],
            [value.value for _, value in known],
            _WIDTH * 0.94,
            yerr=[[below for below, _ in errors], [above for _, above in errors]],
            label=f"{cfs} CFS",
            color=colour,
            capsize=3,
            error_kw={"linewidth": 1},
        )
        highs += [value.value if value.high is None else value.high for _, value in known]
        for place, value in zip(places, values, strict=True):
            if value is None:
                axes.annotate(
                    "-", (place, 0), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points"
                )
    axes.set_ylim(
        0, 100 if not highs else min(100.0, 1.08 * max(highs))
    )  # from zero: bars are read by their length
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_xticks(range(len(sizes)), [f"E={factors}, r={rank}" for factors, rank in sizes])
    axes.set_ylabel(f"{MEAN_TITLE}, per cent")
    axes.set_title(table.layout.title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"figure4.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=160)
    return paths


def _value(table: TableValues, size: tuple[str, ...], cfs: str) -> Value | None:
    row = next(each for each in table.rows if each.row.labels[1:] == (*size, cfs))
    return row.values.get(MEAN_TITLE)


def _errors(value: Value) -> tuple[float, float]:
    """How far the interval reaches below and above; NaN, which draws nothing, where there is none."""
    if value.low is None or value.high is None:
        return math.nan, math.nan
    return value.value - value.low, value.high - value.value
