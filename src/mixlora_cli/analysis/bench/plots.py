"""The layers' ratios against their width, one panel for each number format, the goal drawn as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixlora_cli.analysis.bench.comparisons import EXTRA, Comparison
from mixlora_cli.analysis.bench.goals import GOALS

NAME = "ratio"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind eyes too
_TITLES = {"fp32": "fp32", "bf16": "bf16"}
_HEIGHT = 4.2


def draw_ratios(found: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write `ratio.png` and `ratio.svg`; nothing where no layer was measured."""
    shown = [
        one for one in found if one.name == EXTRA and one.factors == int(one.measurement.case["factors"])
    ]
    if not shown:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = [dtype for dtype in _TITLES if any(one.measurement.case["dtype"] == dtype for one in shown)]
    with pyplot.rc_context({"svg.hashsalt": "mixlora", "font.size": 10}):
        figure, panels = pyplot.subplots(
            1,
            len(dtypes),
            figsize=(4.6 * len(dtypes), _HEIGHT),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, dtype in zip(panels[0], dtypes, strict=True):
            _panel(axes, dtype, [one for one in shown if one.measurement.case["dtype"] == dtype])
        panels[0][0].set_ylabel("extra time, MixLoRA / LoRA\n(above the frozen layer alone)")
        paths = [folder / f"{NAME}.png", folder / f"{NAME}.svg"]
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def _panel(axes: Any, dtype: str, found: Sequence[Comparison]) -> None:
    shapes = list(dict.fromkeys(str(one.measurement.case["shape"]) for one in found))
    batches = sorted({int(one.measurement.case["batch"]) for one in found})
    for number, batch in enumerate(batches):
        points = [
            one for one in found if one.measurement.case["batch"] == batch and one.estimate.value is not None
        ]
        if not points:
            continue
        x = [
            shapes.index(str(one.measurement.case["shape"])) + 0.08 * (number - (len(batches) - 1) / 2)
            for one in points
        ]
        y = [float(one.estimate.value or 0.0) for one in points]
        axes.errorbar(
            x,
            y,
            yerr=_arms(points),
            marker="o",
            capsize=3,
            color=COLOURS[number % len(COLOURS)],
            label=f"batch {batch}",
        )
    for goal in GOALS:
        if goal.comparison == EXTRA and goal.dtype == dtype:
            axes.axhline(goal.limit, linestyle="--", color="0.3", label=f"goal: at most {goal.limit}")
    axes.axhline(0, color="0.8", linewidth=0.8)
    factors, rank = found[0].factors, found[0].measurement.case["rank"]
    axes.set_title(f"{_TITLES[dtype]}, E={factors}, r={rank}")
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_xlabel("width of the layer")
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False)


def _arms(points: Sequence[Comparison]) -> list[list[float]]:
    """Lengths below and above each point; an end that is not known is left out."""
    below, above = [], []
    for one in points:
        value = float(one.estimate.value or 0.0)
        below.append(0.0 if one.estimate.low is None else value - one.estimate.low)
        above.append(0.0 if one.estimate.high is None else one.estimate.high - value)
    return [below, above]
