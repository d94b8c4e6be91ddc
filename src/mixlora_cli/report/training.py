"""What the report shows of trainings: loss over steps, use of the factors, and accuracy by task before and after."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from mixlora_cli.benchmarks.registry import seen_title
from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.results import FILE_NAME, Results, Score, read_results
from mixlora_cli.hydra_conf import eval_dir
from mixlora_cli.models.session import label_of
from mixlora_cli.plots import HUES, figure, line_style, name_axes
from mixlora_cli.training.curves import Curve, losses, mean_losses, routing
from mixlora_cli.training.run_folder import RunFolder, read_metrics

MEASURES = {
    "entropy": "entropy of the use, 1: all alike",
    "unused": "share of factors never used",
    "information": "mutual information with tasks, nats",
}
"""What is drawn of the routers: what metrics.jsonl has it under, less the side, and what the axis says."""
Figure = tuple[str, str, Path]
"""Heading, caption and file."""
_HATCHES = ("", "....", "\\\\\\\\", "xxxx", "----")


@dataclass(frozen=True)
class Training:
    """A training, finished or going on, by the files of its run folder."""

    label: str
    folder: Path
    config: Mapping[str, Any]
    """What config.yaml says; nothing without that file."""
    rows: Sequence[Mapping[str, Any]]
    """Those of metrics.jsonl, one at least."""
    finished: bool

    @cached_property
    def results(self) -> Results | None:
        """The evaluation of its held-out instances."""
        return find_seen(self.folder)

    def sides(self, measure: str) -> dict[str, Curve]:
        """A measure of the routers of A and of B; under "" where they are the same, nothing without routers."""
        a, b = (routing(self.rows, f"{measure}_{side}") for side in "ab")
        return {side: curve for side, curve in ({"": a} if a == b else {"A": a, "B": b}).items() if curve}


@dataclass(frozen=True)
class Drawn:
    """What the page shows of trainings."""

    told: Sequence[tuple[str, str]] = ()
    """Label of each, and how far it has come."""
    figures: Sequence[Figure] = ()
    missing: Sequence[str] = ()
    """Sentences about what is not shown, and how to get it."""


NOTHING = Drawn()


def read_training(folder: str) -> Training | None:
    """The training in a run folder; None where no step is logged. Raises UserError when a file is broken."""
    run = RunFolder(Path(folder).expanduser())
    try:
        rows = read_metrics(run.metrics)
        if not rows:
            return None
        if len(rows) < len(run.metrics.read_text().splitlines()) - 1:  # the last one alone may be cut short
            raise ValueError(f"line {len(rows) + 1} cannot be read")
        mean_losses(rows, 1, rows[-1]["step"])
        config: Any = OmegaConf.to_container(OmegaConf.load(run.config)) if run.started else {}
        label = label_of(config) if config else run.root.name
    except Exception as error:  # whatever became of the files
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"run={folder}: its metrics.jsonl or config.yaml is not as `mixlora train` writes it: {reason}"
        ) from error
    return Training(label, run.root, config, rows, run.finished)


def find_seen(folder: Path) -> Results | None:
    """Results that have seen tasks, in a folder or its evaluations. Raises UserError when a file is broken."""
    files = [folder / place / FILE_NAME for place in (".", "eval", "eval-seen")]
    return next((found for file in files if file.is_file() and (found := read_results(file)).seen), None)


def draw_trainings(trainings: Sequence[Training], base: str | None, folder: Path) -> Drawn:
    """Draw into `folder` what trainings tell.

    Args:
        trainings: in the order of their colours.
        base: an evaluation of the untuned base; None: where `mixlora eval` puts that of their model, if it is there.
        folder: for the PNG files.

    Raises:
        UserError: there are no results of seen tasks in `base`, or a file is broken.
    """
    models = [each.config.get("model", {}).get("name", "mini") for each in trainings]
    # Of several models there are several bases.
    place = Path(base or eval_dir(None, models[0])).expanduser()
    before = find_seen(place) if base or len(set(models)) == 1 else None
    if base and before is None:
        raise UserError(f"base={base}: no results of seen tasks there, as of `mixlora eval eval.seen=true`")
    steps = [each.rows[-1]["step"] for each in trainings]
    window = max(max(steps) // 10, 5 * max(row["loss_steps"] for each in trainings for row in each.rows))
    figures = [_draw_losses(trainings, window, folder / "training-loss.png")]
    if measured := [name for name in MEASURES if any(each.sides(name) for each in trainings)]:
        figures.append(_draw_factors(trainings, measured, folder / "training-factors.png"))
    if any(each.results for each in trainings):
        figures.append(_draw_tasks(trainings, before, folder / "training-tasks.png"))
    needed = [
        f"`mixlora eval {shlex.quote(f'run={each.folder}')} eval.seen=true`"
        + ("" if each.finished else " once it has finished")
        for each in trainings
        if not each.results
    ]
    if before is None:
        needed.append("`mixlora eval adapter=none eval.seen=true` with the training's keys of model and data")
    missing = [f"Held-out accuracy by task, before and after, needs {', '.join(needed)}."] if needed else []
    if len({_instances(each) for each in (before, *(each.results for each in trainings)) if each}) > 1:
        missing.append("The evaluations of the seen tasks are not all of the same held-out instances.")
    return Drawn([(each.label, _told(each, window)) for each in trainings], figures, missing)


def _told(training: Training, window: int) -> str:
    last = training.rows[-1]["step"]
    (loss,), (steps,) = mean_losses(training.rows, [last - window + 1], [last])
    planned = training.config.get("train", {}).get("steps")
    of = f" of {planned}" if planned else ""
    come = f"{last} steps" if training.finished else f"step {last}{of} so far"
    return f"{come}, training loss {loss:.3f} over the last {steps}"


def _instances(results: Results) -> str:
    """Digest of the held-out instances that were answered; "" where it is not known."""
    parts = str(results.about.get("fingerprint", {}).get("data", "")).split()
    return next((part for part in parts if part.startswith("heldout:")), "")


def _draw_losses(trainings: Sequence[Training], window: int, path: Path) -> Figure:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    short = max(len(losses(each.rows)) for each in trainings) < 3  # nothing to be smoothed
    with figure([path], figsize=(8, 4.2)) as (drawn, ((axes,),)):
        for place, training in enumerate(trainings):
            style, curve = line_style(place), losses(training.rows)
            steps, means = np.array(list(curve)), np.array(list(curve.values()))
            if not short:
                means, _ = mean_losses(training.rows, steps - window // 2, steps + window // 2)
            axes.plot(steps, list(curve.values()), "o", color=style["color"], ms=3, mew=0, alpha=0.3)
            axes.plot(steps, means, **style, linewidth=1.8, label=training.label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        name_axes(axes, "steps", "loss per answer token, nats (log scale)")
        _add_legend(drawn, axes)
    lines = "" if short else f" Lines: means over the {window} steps around."
    return "Training loss", f"Points: losses as logged.{lines}", path


def _draw_factors(trainings: Sequence[Training], measures: Sequence[str], path: Path) -> Figure:
    with figure([path], 1, len(measures), figsize=(3.3 * len(measures), 3.4)) as (drawn, (row,)):
        for axes, measure in zip(row, measures, strict=True):
            for place, training in enumerate(trainings):
                for side, curve in training.sides(measure).items():
                    look = {
                        **line_style(place),
                        "marker": "o" if side == "B" or len(curve) == 1 else "",
                        "ms": 3,
                    }
                    label = f"{training.label}{side and ', '}{side}"
                    axes.plot(list(curve), list(curve.values()), **look, label=label)
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1] if measure == "information" else 1.02)
            name_axes(axes, "steps", MEASURES[measure])
        _add_legend(drawn, row[0])
    caption = (
        "Means over the layers, of the instances since the point before; A and B where they are not the same."
    )
    return "Use of the factors", caption, path


def _draw_tasks(trainings: Sequence[Training], before: Results | None, path: Path) -> Figure:
    """Bars of the mean and of each task, in the order of the first training's."""
    bars: list[tuple[str, Score, dict[str, Any]]] = [
        (each.label, each.results.seen, {"color": HUES[n % len(HUES)], "hatch": _HATCHES[n % len(_HATCHES)]})
        for n, each in enumerate(trainings)
        if each.results and each.results.seen
    ]
    first = bars[0][1].parts
    if before and before.seen:
        bars.insert(0, ("before training", before.seen, {"color": "0.5", "hatch": "////"}))
    tasks = sorted(first, key=lambda task: (-first[task]["accuracy"], task))
    tasks += sorted({task for _, score, _ in bars for task in score.parts} - set(first))
    places, thick = np.arange(len(tasks) + 1), 0.8 / len(bars)
    with figure([path], figsize=(8, 1 + len(places) * (0.1 + 0.13 * len(bars)))) as (drawn, ((axes,),)):
        for number, (label, score, look) in enumerate(bars):
            parts = [score.parts.get(task, {}) for task in tasks]
            values, lows, highs = (
                np.array([whole, *(part.get(key) for part in parts)], dtype=np.float64)
                for key, whole in (("accuracy", score.value), ("low", score.low), ("high", score.high))
            )
            look |= {"label": label, "edgecolor": "white", "alpha": 0.7, "error_kw": {"linewidth": 0.9}}
            ends = np.maximum([values - lows, highs - values], 0)
            axes.barh(places + (number - (len(bars) - 1) / 2) * thick, values, thick, xerr=ends, **look)
        axes.set_yticks(places, ["mean", *(cut(seen_title(task), 60) for task in tasks)])
        axes.axhline(0.5, color="0.6", linewidth=0.8)
        axes.set(xlim=(0, 100), ylim=(len(tasks) + 0.6, -0.6))
        name_axes(axes, "exact match, per cent", "")
        _add_legend(drawn, axes)
    return "Accuracy by task", "Held-out instances of the training tasks, 95 % intervals.", path


def _add_legend(drawn: Any, axes: Any) -> None:
    """Above the figure, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(4, 110 // max(map(len, labels), default=1)))
    look = {"ncols": columns, "frameon": False, "fontsize": 8, "handlelength": 3.5}
    drawn.legend(handles, labels, loc="outside upper left", **look)
