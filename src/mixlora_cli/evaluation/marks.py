"""Marks of single answers, by instance: what a paired comparison needs of a predictions file."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.benchmarks import benchmark_named
from mixlora_cli.evaluation.folder import check_finished, find_evaluation, open_evaluation
from mixlora_cli.evaluation.metrics import EXACT, Metric
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.results import Results, read_results
from mixlora_cli.evaluation.scorers import mme_right
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.evaluation.statistics import Floats
from mixlora_cli.evaluation.tallies import mme_images

Task = tuple[str, str]
"""Split and benchmark."""


@dataclass
class Marks:
    """One task's marks of one run."""

    metric: Metric
    by_index: dict[int, float] = field(default_factory=dict)
    questions: dict[int, bytes] = field(default_factory=dict)
    """Digests that tell whether two runs answered the same."""
    images: dict[int, tuple[str, str]] = field(default_factory=dict)
    """MME alone: subtask and image of each instance."""

    def add(self, prediction: Prediction) -> None:
        """Mark one more answer."""
        index = prediction.index
        text = f"{prediction.question}\0{prediction.target}\0{prediction.category}\0{prediction.image_id}"
        self.questions[index] = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if self.metric.mark is None:
            self.by_index[index] = float(mme_right(prediction.prediction, prediction.target))
            self.images[index] = (prediction.category, prediction.image_id)
        else:
            self.by_index[index] = float(self.metric.mark(prediction))


@dataclass(frozen=True)
class Run:
    """A finished evaluation: its scores, and the marks that made them."""

    name: str
    """As the user gave it."""
    results: Results
    tasks: Mapping[Task, Marks]


def read_run(folder: str) -> Run:
    """The evaluation in a folder or in the run folder around it; scored anew where `results.json` is missing.

    Raises UserError when there is none or it has not finished.
    """
    place = find_evaluation(Path(folder))
    header, reader = open_evaluation(place)
    tasks: dict[Task, Marks] = {}
    for prediction in reader:
        task = prediction.split, prediction.benchmark
        if task not in tasks:
            known = benchmark_named(prediction.benchmark, header.about.get("benchmarks")).metric
            tasks[task] = Marks(EXACT if prediction.split == "heldout" else known)
        tasks[task].add(prediction)
    check_finished(place, header, reader)
    results = read_results(place) if (place / "results.json").is_file() else score(place)
    return Run(folder, results, tasks)


def shared(first: Marks, second: Marks, where: str) -> list[int]:
    """Indices of the instances that both answered.

    Raises UserError when there are none, or when an index stands for different questions: other data.
    """
    both = sorted(first.by_index.keys() & second.by_index.keys())
    if not both:
        raise UserError(
            f"{where}: the two evaluations have no instance in common; use the same eval.limit and seed"
        )
    if other := next((index for index in both if first.questions[index] != second.questions[index]), None):
        raise UserError(
            f"{where}: instance {other} is another question in each; evaluate both on the same data"
        )
    return both


def shared_by_all(marks: Sequence[Marks], where: str) -> list[int]:
    """Indices of the instances that all answered; raises as `shared` does."""
    first, *others = marks
    common = first.by_index.keys() & set.intersection(*(set(shared(first, each, where)) for each in others))
    if not common:
        raise UserError(f"{where}: no instance was answered by all of {len(marks)} evaluations")
    return sorted(common)


def require_same(runs: Sequence[Run], tasks: Sequence[Task]) -> None:
    """Raise UserError unless all runs answered the same instances of these tasks: means of different ones differ
    without any model being better.
    """
    first, *others = runs
    for run in others:
        for split, name in tasks:
            ours, theirs = first.tasks[split, name], run.tasks[split, name]
            if len(shared(ours, theirs, name)) < max(len(ours.by_index), len(theirs.by_index)):
                raise UserError(
                    f"{name}: {first.name} and {run.name} did not answer the same instances "
                    f"({len(ours.by_index)} and {len(theirs.by_index)}); runs are averaged over seeds only on the "
                    "same: evaluate all with one eval.limit and one seed"
                )


def pairs(first: Marks, second: Marks, indices: Sequence[int]) -> tuple[Floats, Floats]:
    """Marks (n,) of both on the same instances."""
    return (
        np.array([first.by_index[index] for index in indices], dtype=np.float64),
        np.array([second.by_index[index] for index in indices], dtype=np.float64),
    )


def mme_value(marks: Marks, indices: Sequence[int]) -> float:
    """MME's score in points on these instances: over subtasks the sum of 100 * accuracy + 100 * accuracy-plus."""
    return 100 * sum(float(points.mean(axis=0).sum()) for points in _mme_points(marks, indices).values())


def mme_differences(first: Marks, second: Marks, indices: Sequence[int]) -> list[Floats]:
    """For each subtask (images,): second minus first of an image's accuracy plus accuracy-plus, in [-2, 2]."""
    by_subtask = [_mme_points(marks, indices) for marks in (first, second)]
    return [
        by_subtask[1][subtask].sum(axis=1) - by_subtask[0][subtask].sum(axis=1)
        for subtask in sorted(by_subtask[0])
    ]


def _mme_points(marks: Marks, indices: Sequence[int]) -> dict[str, Floats]:
    images: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for index in indices:
        subtask, image = marks.images[index]
        images[subtask][image].append(bool(marks.by_index[index]))
    return {subtask: mme_images(subtask, found) for subtask, found in images.items()}
