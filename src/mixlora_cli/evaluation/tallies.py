"""Count a benchmark's answers one at a time: what is kept does not grow with the number of instances.

(MME keeps two marks an image, because its questions come in pairs.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.scorers import mme_right, pope_answer
from mixlora_cli.evaluation.statistics import (
    RESAMPLES,
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


class _Categories:
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


def _share(marks: Counter[bool]) -> float:
    return 100 * marks[True] / marks.total()


def proportion(marks: Counter[bool], parts: Parts | None = None) -> Measured:
    """Per cent of True with Wilson's interval."""
    interval = wilson(marks[True], marks.total()).scaled(100)
    counted = {float(mark): count for mark, count in marks.items() if count}
    return Measured(_share(marks), interval, parts or {}, counted)


class AccuracyTally:
    """Per cent of answers that are right by a rule; of each category too where there are several."""

    def __init__(self, right: Callable[[Prediction], bool]) -> None:
        self._right = right
        self._categories = _Categories()
        self._marks: dict[str, Counter[bool]] = {}

    def add(self, prediction: Prediction) -> None:
        name = self._categories.note(prediction)
        self._marks.setdefault(name, Counter())[self._right(prediction)] += 1

    def measured(self) -> Measured:
        names = self._categories.ordered()
        together: Counter[bool] = sum(self._marks.values(), Counter())
        if len(names) == 1:
            return proportion(together)
        parts = {
            name: {"accuracy": _share(self._marks[name]), "n": float(self._marks[name].total())}
            for name in names
        }
        return proportion(together, parts)


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
        self._categories = _Categories()
        self._images: dict[str, dict[str, list[bool]]] = {}

    def add(self, prediction: Prediction) -> None:
        subtask = self._categories.note(prediction)
        right = mme_right(prediction.prediction, prediction.target)
        self._images.setdefault(subtask, {}).setdefault(prediction.image_id, []).append(right)

    def measured(self) -> Measured:
        """Raises UserError when an image has not two questions."""
        rng = np.random.default_rng(SEED)
        parts: Parts = {}
        total = np.zeros(RESAMPLES)
        unknown = 0
        for subtask in self._categories.ordered():
            images = mme_images(subtask, self._images[subtask])
            accuracy, plus = 100 * images.mean(axis=0)
            parts[subtask] = {
                "score": float(accuracy + plus),
                "accuracy": float(accuracy),
                "accuracy_plus": float(plus),
                "images": float(len(images)),
            }
            if len(images) < MME_MIN_IMAGES:
                unknown += 1
            else:
                total += 100 * bootstrap_means(images, rng).sum(axis=1)
        known = percentile(total)
        interval = Interval(known.low, known.high + 200 * unknown)
        value = sum(part["score"] for part in parts.values())
        return Measured(value, interval, {**parts, **_halves(parts)})


def mme_images(subtask: str, images: Mapping[str, list[bool]]) -> Floats:
    """(images, 2): share of an image's two questions that are right, and 1 where both are."""
    for image, marks in images.items():
        if len(marks) != 2:
            raise UserError(
                f"MME subtask {subtask}, image {image!r}: {len(marks)} questions, expected two; "
                "pairs are found by image_id, check that field in the data"
            )
    return np.array([(sum(marks) / 2, float(all(marks))) for marks in images.values()], dtype=np.float64)


def _halves(parts: Parts) -> Parts:
    """Perception and cognition, where all of their subtasks are there."""
    halves = (("perception", PERCEPTION), ("cognition", COGNITION))
    return {
        half: {"score": sum(parts[name]["score"] for name in names)}
        for half, names in halves
        if all(name in parts for name in names)
    }


class PopeTally:
    """POPE's accuracy over all categories; its other numbers by category and over all under "all"."""

    def __init__(self) -> None:
        self._categories = _Categories()
        self._pairs: dict[str, Counter[tuple[str, str]]] = {}

    def add(self, prediction: Prediction) -> None:
        name = self._categories.note(prediction)
        pair = pope_answer(prediction.prediction), prediction.target.strip().lower()
        self._pairs.setdefault(name, Counter())[pair] += 1

    def measured(self) -> Measured:
        together: Counter[tuple[str, str]] = sum(self._pairs.values(), Counter())
        parts = {name: pope_numbers(self._pairs[name]) for name in self._categories.ordered() if name}
        right = sum(count for (answer, target), count in together.items() if answer == target)
        marks = Counter({True: right, False: together.total() - right})
        return proportion(marks, {**parts, "all": pope_numbers(together)})


def pope_numbers(pairs: Counter[tuple[str, str]]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and yes-ratio in per cent, "yes" being the positive class.

    Precision, recall and F1 are 0 where their denominator is. The yes-ratio is that of the answers.
    """
    total, hits = pairs.total(), pairs["yes", "yes"]
    said_yes = sum(count for (answer, _), count in pairs.items() if answer == "yes")
    is_yes = sum(count for (_, target), count in pairs.items() if target == "yes")
    right = sum(count for (answer, target), count in pairs.items() if answer == target)
    return {
        "accuracy": 100 * right / total,
        "precision": 100 * hits / said_yes if said_yes else 0.0,
        "recall": 100 * hits / is_yes if is_yes else 0.0,
        "f1": 200 * hits / (said_yes + is_yes) if said_yes + is_yes else 0.0,
        "yes_ratio": 100 * said_yes / total,
        "n": float(total),
    }
