"""What a study's trainings learned over their steps: loss, and how far the routers tell tasks apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mixlora_cli.plots import figure, line_style, name_axes
from mixlora_cli.stats import Floats
from mixlora_cli.training.curves import Curve, Rows, losses, mean_losses, routing
from mixlora_cli.training.run_folder import read_metrics

Trainings = Mapping[str, Mapping[int, Path]]
"""`metrics.jsonl` by the row's title and the seed."""
_WINDOW = 100
"""Steps that a point of the loss is the mean over: one step's is of eight instances."""


def draw_curves(trainings: Trainings, reference: str, folder: Path) -> list[Path]:
    """Two figures, each as PNG and SVG: loss, also beside that of `reference`, and mutual information.

    Losses are of instances that are new to the model, the same ones in the same order for trainings of one seed; what
    is drawn is the mean over the seeds, of differences over those that both rows have.
    """
    losses = {title: _by_seed(seeds, _loss) for title, seeds in trainings.items()}
    beside = losses.get(reference, {})
    differences = {
        title: {seed: _minus(found, beside[seed]) for seed, found in seeds.items() if seed in beside}
        for title, seeds in losses.items()
    }
    panels = [("loss per answer token, nats", losses), (f"the same minus that of {reference}", differences)]
    told = {title: _by_seed(seeds, _information) for title, seeds in trainings.items()}
    written = _draw(panels, [folder / f"study-loss.{kind}" for kind in ("png", "svg")])
    return written + _draw(
        [("mutual information of task and factor, nats", told)],
        [folder / f"study-information.{kind}" for kind in ("png", "svg")],
    )


def _by_seed(seeds: Mapping[int, Path], read: Callable[[Rows], Curve]) -> dict[int, Curve]:
    return {seed: found for seed, path in seeds.items() if (found := read(read_metrics(path)))}


def _loss(rows: Rows) -> Curve:
    """Mean loss of each whole window, at its last step."""
    ends = np.arange(_WINDOW, max(losses(rows), default=0) + 1, _WINDOW)
    means, steps = mean_losses(rows, ends - _WINDOW + 1, ends)
    return {int(end): float(mean) for end, mean, of in zip(ends, means, steps, strict=True) if of == _WINDOW}


def _information(rows: Rows) -> Curve:
    return routing(rows, "information_a")


def _minus(curve: Curve, other: Curve) -> Curve:
    return {step: value - other[step] for step, value in curve.items() if step in other}


def _over_seeds(seeds: Mapping[int, Curve]) -> tuple[list[int], Floats]:
    """The steps that all seeds have, and their mean there."""
    curves = list(seeds.values())
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return steps, np.array([np.mean([curve[step] for curve in curves]) for step in steps])


def _draw(
    panels: Sequence[tuple[str, Mapping[str, Mapping[int, Curve]]]], paths: Sequence[Path]
) -> list[Path]:
    titles = list(panels[0][1])
    with figure(paths, 1, len(panels), figsize=(6 * len(panels), 4), dpi=130) as (_, (row,)):
        for axes, (label, rows) in zip(row, panels, strict=True):
            for place, title in enumerate(titles):
                steps, values = _over_seeds(rows[title])
                if steps:
                    axes.plot(steps, values, **line_style(place), linewidth=1.4, label=title)
            if len(panels) == 1:
                axes.set_ylim(bottom=0)  # information, of which none is the least
            name_axes(axes, "steps", label)
        row[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return list(paths)
