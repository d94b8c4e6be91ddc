"""Count a benchmark's answers one at a time: what is kept does not grow with the number of instances.

(MME keeps two marks an image, because its questions come in pairs.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.mme_parts import ResampledSum, mme_part
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.scorers import mme_right
from mixlora_cli.evaluation.statistics import (
    SEED,
    Floats,
    Interval,
    bootstrap_counts,
    bootstrap_means,
    percentile,
    wilson,
)

Parts = dict[str, dict[str, float]]
Marks = Mapping[float, int]
"""Each mark that instances got, in [0, 1], and how many got it."""

MME_MIN_IMAGES = 3
PERCEPTION = [
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
HALVES = (("perception", PERCEPTION), ("cognition", COGNITION))


@dataclass(frozen=True)
class Measured:
    """What a metric finds in one benchmark's answers."""

    value: float
    """The score, in the metric's unit."""
    interval: Interval
    parts: Parts = field(default_factory=dict)
    """Numbers of each subtask or category."""
    marks: Marks = field(default_factory=dict)
    """Marks of the instances where the score is 100 times their mean; else empty."""


class Tally(Protocol):
    """Takes predictions one at a time, in any order, each instance once."""

    def add(self, prediction: Prediction) -> None: ...
    def measured(self) -> Measured: ...


class Categories:
    """Names of categories in the order of their first instance in the data, whatever order answers come in."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}

    def note(self, prediction: Prediction) -> str:
        name = prediction.category
        self._first[name] = min(prediction.index, self._first.get(name, prediction.index))
        return name

    def ordered(self) -> list[str]:
        return sorted(self._first, key=lambda name: (self._first[name], name))


def mean_of(marks: Marks) -> float:
    """Mean of marks, the same whatever order they came in."""
    return math.fsum(mark * count for mark, count in marks.items()) / sum(marks.values())


def share(marks: Counter[bool]) -> float:
    """Per cent of True."""
    return 100 * marks[True] / marks.total()


def proportion(marks: Counter[bool], parts: Parts | None = None) -> Measured:
    """Per cent of True with Wilson's interval."""
    interval = wilson(marks[True], marks.total()).scaled(100)
    counted = {float(mark): count for mark, count in marks.items() if count}
    return Measured(share(marks), interval, parts or {}, counted)


class AccuracyTally:
    """Per cent of answers that are right by a rule; of each category too where there are several."""

    def __init__(self, right: Callable[[Prediction], bool]) -> None:
        self._right = right
        self._categories = Categories()
        self._marks: dict[str, Counter[bool]] = {}

    def add(self, prediction: Prediction) -> None:
        name = self._categories.note(prediction)
        self._marks.setdefault(name, Counter())[self._right(prediction)] += 1

    def measured(self) -> Measured:
        names = self._categories.ordered()
        together: Counter[bool] = sum(self._marks.values(), Counter())
        if len(names) == 1:
            return proportion(together)
        return proportion(together, {name: _part(self._marks[name]) for name in names})


def _part(marks: Counter[bool]) -> dict[str, float]:
    found = proportion(marks)
    interval = {"low": found.interval.low, "high": found.interval.high}
    return {"accuracy": found.value, **interval, "n": float(marks.total())}


class GradedTally:
    """100 times the mean of marks in [0, 1]; the interval is bootstrapped over instances."""

    def __init__(self, mark: Callable[[Prediction], float]) -> None:
        self._mark = mark
        self._marks: Counter[float] = Counter()

    def add(self, prediction: Prediction) -> None:
        self._marks[self._mark(prediction)] += 1

    def measured(self) -> Measured:
        mean = mean_of(self._marks)
        if len(self._marks) == 1:
            # Marks that are all alike have no spread to resample, which is no certainty; whole ones are a proportion.
            count = self._marks.total()
            interval = wilson(round(mean * count), count).scaled(100)
        else:
            interval = percentile(100 * resampled(self._marks, np.random.default_rng(SEED)))
        return Measured(100 * mean, interval, marks=dict(self._marks))


def resampled(marks: Marks, rng: np.random.Generator) -> Floats:
    """Means of bootstrap samples of the instances: (RESAMPLES,)."""
    values = np.array(sorted(marks), dtype=np.float64)
    return bootstrap_counts(values[:, None], np.array([marks[float(value)] for value in values]), rng)[:, 0]


class MmeTally:
    """MME's total: sum over subtasks of 100 * accuracy + 100 * accuracy-plus, pairs by image_id, in any order.

    The interval is bootstrapped over images within each subtask; one with fewer than MME_MIN_IMAGES of them says
    nothing about its spread, and widens the interval by all that it could score.
    """

    def __init__(self) -> None:
        self._categories = Categories()
        self._images: dict[str, dict[str, list[bool]]] = {}

    def add(self, prediction: Prediction) -> None:
        subtask = self._categories.note(prediction)
        right = mme_right(prediction.prediction, prediction.target)
        self._images.setdefault(subtask, {}).setdefault(prediction.image_id, []).append(right)

    def measured(self) -> Measured:
        """Raises UserError when an image has not two questions."""
        rng = np.random.default_rng(SEED)
        parts: Parts = {}
        total = ResampledSum()
        halves = {half: ResampledSum() for half, _ in HALVES}
        for subtask in self._categories.ordered():
            images = mme_images(subtask, self._images[subtask])
            few = len(images) < MME_MIN_IMAGES
            samples = None if few else 100 * bootstrap_means(images, rng).sum(axis=1)
            parts[subtask] = mme_part(images, samples)
            for resampled_sum in (total, *(halves[half] for half, names in HALVES if subtask in names)):
                resampled_sum.add(samples)
        value = sum(part["score"] for part in parts.values())
        return Measured(value, total.interval(), {**parts, **_halves(parts, halves)})


def mme_images(subtask: str, images: Mapping[str, list[bool]]) -> Floats:
    """(images, 2): share of an image's two questions that are right, and 1 where both are."""
    for image, marks in images.items():
        if len(marks) != 2:
            raise UserError(
                f"MME subtask {cut(subtask)}, image {cut(repr(image))}: {len(marks)} questions, "
                "expected two; pairs are found by image_id, check that field in the data"
            )
    return np.array([(sum(marks) / 2, float(all(marks))) for marks in images.values()], dtype=np.float64)


def _halves(parts: Parts, sums: Mapping[str, ResampledSum]) -> Parts:
    """Perception and cognition, where all of their subtasks are there."""
    found: Parts = {}
    for half, names in HALVES:
        if all(name in parts for name in names):
            interval = sums[half].interval()
            score = sum(parts[name]["score"] for name in names)
            found[half] = {"score": score, "low": interval.low, "high": interval.high}
    return found


def mme_subtasks(parts: Iterable[str]) -> list[str]:
    """Names of the subtasks among the parts of an MME score, without the sums of its halves."""
    halves = [half for half, _ in HALVES]
    return [name for name in parts if name not in halves]
