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
from mixlora_cli.paths import conf_dir
from mixlora_cli.plots import figure, line_style, name_axes
from mixlora_cli.training.curves import Curve, losses, mean_losses, routing
from mixlora_cli.training.run_folder import RunFolder, read_metrics

SMOOTHED = 10
"""A point of the smoothed losses is the mean over a tenth of the longest training's steps."""
MEASURES = {
    "entropy": "entropy of the use, 1: all alike",
    "unused": "share of factors never used",
    "information": "mutual information with tasks, nats",
}
"""What is drawn of the routers: what metrics.jsonl has it under, less the side, and what the axis says."""
_EVALUATIONS = (".", "eval", "eval-seen")
_UNTUNED = {"color": "0.85", "hatch": "////", "edgecolor": "0.5"}
_HATCHES = ("", "....", "\\\\\\\\", "xxxx", "----")
_WIDEST_NAME = 60


@dataclass(frozen=True)
class Training:
    """A training, finished or going on, as its run folder tells of it."""

    label: str
    folder: Path
    config: Mapping[str, Any]
    """What config.yaml says; nothing without that file."""
    rows: Sequence[Mapping[str, Any]]
    """Those of metrics.jsonl, one at least."""
    finished: bool

    @property
    def steps(self) -> int:
        """The last step that is logged."""
        return int(self.rows[-1]["step"])

    @cached_property
    def seen(self) -> Score | None:
        """Accuracy on the held-out instances of its tasks, from the evaluation in its folder."""
        return self.results.seen if self.results else None

    @cached_property
    def results(self) -> Results | None:
        """The evaluation that has it."""
        return find_seen(self.folder)

    def told(self, window: int) -> str:
        """How far it has come, and its loss over the last steps of a window."""
        (loss,), (steps,) = mean_losses(self.rows, [self.steps - window + 1], [self.steps])
        planned = self.config.get("train", {}).get("steps")
        of = f" of {planned}" if planned else ""
        come = f"{self.steps} steps" if self.finished else f"step {self.steps}{of} so far"
        return f"{come}, training loss {loss:.3f} over the last {steps}" if steps else come

    def sides(self, measure: str) -> dict[str, Curve]:
        """A measure of the routers of A and of B; under "" where they are the same, nothing without routers."""
        by_side = {side: routing(self.rows, f"{measure}_{side.lower()}") for side in "AB"}
        if by_side["A"] == by_side["B"]:
            by_side = {"": by_side["A"]}
        return {side: curve for side, curve in by_side.items() if curve}


@dataclass(frozen=True)
class Drawing:
    """A figure of the page."""

    heading: str
    caption: str
    path: Path


def read_training(folder: str) -> Training | None:
    """The training in a run folder; None where no step is logged. Raises UserError when a file is broken."""
    run = RunFolder(Path(folder).expanduser())
    try:
        rows = read_metrics(run.metrics)
        if not rows:
            return None
        lines = len(run.metrics.read_text().splitlines())
        if len(rows) < lines - 1:  # the last one alone may be cut short
            raise ValueError(f"line {len(rows) + 1} of {lines} cannot be read")
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
    """Results that have seen tasks, of an evaluation or a run in the folder; None without any.

    Raises UserError when a file is broken.
    """
    files = [folder / place / FILE_NAME for place in _EVALUATIONS]
    return next((found for file in files if file.is_file() and (found := read_results(file)).seen), None)


def smoothed_over(trainings: Sequence[Training]) -> int:
    """Steps that a point of the smoothed losses is the mean over."""
    return max(max(training.steps for training in trainings) // SMOOTHED, 1)


def draw_trainings(
    trainings: Sequence[Training], base: str | None, folder: Path
) -> tuple[list[Drawing], list[str]]:
    """Draw into `folder` what trainings tell; also sentences about what is missing, and how to get it.

    Args:
        trainings: in the order of their colours.
        base: an evaluation of the untuned base; None: where `mixlora eval` puts that of their model, if it is there.
        folder: for the PNG files.

    Raises:
        UserError: there are no results of seen tasks in `base`, or a file is broken.
    """
    drawings = [_draw_losses(trainings, folder / "training-loss.png")]
    if measured := [name for name in MEASURES if any(each.sides(name) for each in trainings)]:
        drawings.append(_draw_factors(trainings, measured, folder / "training-factors.png"))
    evaluated = [each for each in trainings if each.seen]
    lacking = [_command(each) for each in trainings if not each.seen]
    untuned: dict[str, Results] = {}
    for each in trainings:
        name = str(each.config.get("model", {}).get("name", "mini"))
        results = find_seen(Path(base).expanduser() if base else Path(eval_dir(None, name)))
        if results:
            untuned["" if base else name] = results
        elif base:
            raise UserError(
                f"base={base}: no results of seen tasks there; give the folder that "
                "`mixlora eval adapter=none eval.seen=true` wrote to"
            )
        elif (command := _base_command(each)) not in lacking:
            lacking.append(command)
    if evaluated:
        drawings.append(_draw_tasks(trainings, untuned, folder / "training-tasks.png"))
    notes = [f"Held-out accuracy by task, before and after, needs {'; '.join(lacking)}."] if lacking else []
    if len({_instances(each) for each in (*untuned.values(), *(each.results for each in evaluated))}) > 1:
        notes.append("The evaluations of the seen tasks are not all of the same held-out instances.")
    return drawings, notes


def _command(training: Training) -> str:
    later = "" if training.finished else " when it has finished"
    return f"`mixlora eval {shlex.quote(f'run={training.folder}')} eval.seen=true`{later}"


def _base_command(training: Training) -> str:
    model, data = (training.config.get(group, {}) for group in ("model", "data"))
    words = [f"model={model.get('name', 'mini')}", f"data={data.get('source', 'mini')}"]
    if not (conf_dir() / "model" / f"{model.get('name', 'mini')}.yaml").is_file():
        words[:1] = ["model=hf", f"model.name_or_path={model.get('name_or_path')}"]
    words += [f"data.{key}={data[key]}" for key in ("root", "heldout", "images") if data.get(key)]
    return f"`mixlora eval adapter=none {shlex.join(words)} eval.seen=true`"


def _instances(results: Results | None) -> str:
    """Digest of the held-out instances that were answered; "" where it is not known."""
    parts = str(results.about.get("fingerprint", {}).get("data", "")).split() if results else []
    return next((part for part in parts if part.startswith("heldout:")), "")


def _draw_losses(trainings: Sequence[Training], path: Path) -> Drawing:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    window = smoothed_over(trainings)
    with figure([path], figsize=(8, 4.2)) as (drawn, ((axes,),)):
        for place, training in enumerate(trainings):
            style, curve = line_style(place), losses(training.rows)
            steps = np.array(list(curve))
            means, _ = mean_losses(training.rows, steps - window // 2, steps + window // 2)
            points = {"markersize": 3, "markeredgewidth": 0, "alpha": 0.3, "color": style["color"]}
            axes.plot(steps, list(curve.values()), "o", **points)
            axes.plot(steps, means, **style, linewidth=1.8, label=training.label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        name_axes(axes, "steps", "loss per answer token, nats (log scale)")
        _add_legend(drawn, axes)
    caption = f"Points: losses as logged. Lines: means over the {window} steps around."
    return Drawing("Training loss", caption, path)


def _draw_factors(trainings: Sequence[Training], measures: Sequence[str], path: Path) -> Drawing:
    with figure([path], 1, len(measures), figsize=(3.3 * len(measures), 3.4)) as (drawn, (row,)):
        for axes, measure in zip(row, measures, strict=True):
            for place, training in enumerate(trainings):
                for side, curve in training.sides(measure).items():
                    look = {"marker": "o", "markersize": 3} if side == "B" else {"linewidth": 1.8}
                    label = ", ".join(filter(None, (training.label, side)))
                    axes.plot(list(curve), list(curve.values()), **line_style(place), **look, label=label)
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1] if measure == "information" else 1.02)
            name_axes(axes, "steps", MEASURES[measure])
        _add_legend(drawn, row[0])
    caption = (
        "Means over the layers, of the instances since the point before; A and B where they are not the same."
    )
    return Drawing("Use of the factors", caption, path)


def _draw_tasks(trainings: Sequence[Training], untuned: Mapping[str, Results], path: Path) -> Drawing:
    """Bars of the mean and of each task, in the order of the first training's."""
    bars: list[tuple[str, Score, dict[str, Any]]] = []
    for name, results in untuned.items():
        assert results.seen is not None
        bars.append((f"before training{name and f' ({name})'}", results.seen, _UNTUNED))
    for place, training in enumerate(trainings):
        if training.seen:
            look = {"color": line_style(place)["color"], "hatch": _HATCHES[place % len(_HATCHES)]}
            bars.append((training.label, training.seen, {**look, "edgecolor": "white", "alpha": 0.7}))
    first = bars[len(untuned)][1].parts
    tasks = sorted(first, key=lambda task: (-first[task]["accuracy"], task))
    tasks += sorted({task for _, score, _ in bars for task in score.parts} - set(first))
    high = (len(tasks) + 1) * (0.1 + 0.13 * len(bars)) + 1
    with figure([path], figsize=(8, high)) as (drawn, ((axes,),)):
        for number, (label, score, look) in enumerate(bars):
            numbers: list[Mapping[str, float | None]] = [
                {"accuracy": score.value, "low": score.low, "high": score.high},
                *(score.parts.get(task, {}) for task in tasks),
            ]
            values, lows, highs = (
                np.array([each.get(key) for each in numbers], dtype=np.float64)
                for key in ("accuracy", "low", "high")
            )
            middles = np.arange(len(tasks) + 1) + (number - (len(bars) - 1) / 2) * 0.8 / len(bars)
            errors = np.maximum(np.stack([values - lows, highs - values]), 0)
            ends = {"linewidth": 0.9, "ecolor": "0.15"}
            axes.barh(middles, values, 0.8 / len(bars), xerr=errors, error_kw=ends, label=label, **look)
        axes.set_yticks(
            range(len(tasks) + 1), ["mean", *(cut(seen_title(task), _WIDEST_NAME) for task in tasks)]
        )
        axes.axhline(0.5, color="0.6", linewidth=0.8)
        axes.set_ylim(len(tasks) + 0.6, -0.6)
        axes.set_xlim(0, 100)
        name_axes(axes, "exact match, per cent", "")
        _add_legend(drawn, axes)
    caption = "Held-out instances of the training tasks, 95 % intervals."
    return Drawing("Accuracy by task" + (", before and after" if untuned else ""), caption, path)


def _add_legend(drawn: Any, axes: Any) -> None:
    """Above the figure, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(4, 110 // max(map(len, labels), default=1)))
    drawn.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=8, handlelength=3.5
    )
