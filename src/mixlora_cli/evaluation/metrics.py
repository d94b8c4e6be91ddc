"""From answered instances to a benchmark's score: a metric is a name, a rule in words and a function."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.scorers import exact_match, label_match, pope_answer, yes_no
from mixlora_cli.evaluation.statistics import (
    RESAMPLES,
    SEED,
    Floats,
    Interval,
    bootstrap_means,
    percentile,
    wilson,
)
from mixlora_cli.evaluation.vqa import vqa_accuracy

Parts = dict[str, dict[str, float]]

MME_MIN_IMAGES = 3


@dataclass(frozen=True)
class Measured:
    """What a metric finds in one benchmark's answers."""

    value: float
    """The score, in the metric's unit."""
    interval: Interval
    parts: Parts = field(default_factory=dict)
    """Numbers of each subtask or category."""
    marks: Floats = field(default_factory=lambda: np.empty(0))
    """(n,) marks of the instances in [0, 1] where the score is 100 times their mean; else empty."""


@dataclass(frozen=True)
class Metric:
    """A way to score a benchmark."""

    name: str
    unit: str
    rule: str
    """What made the number, in words, for whoever reads results.json."""
    measure: Callable[[Sequence[Prediction]], Measured]


def by_category(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions of each category, in order of first appearance; without categories one group named ""."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction.category].append(prediction)
    return dict(groups)


def _share(marks: Sequence[bool]) -> float:
    return 100 * sum(marks) / len(marks)


def proportion(marks: Sequence[bool], parts: Parts | None = None) -> Measured:
    """Per cent of True with Wilson's interval."""
    interval = wilson(sum(marks), len(marks)).scaled(100)
    return Measured(_share(marks), interval, parts or {}, np.array(marks, dtype=np.float64))


def _accuracy(predictions: Sequence[Prediction], right: Callable[[Prediction], bool]) -> Measured:
    groups = by_category(predictions)
    if len(groups) == 1:
        return proportion([right(prediction) for prediction in predictions])
    judged = {name: [right(prediction) for prediction in group] for name, group in groups.items()}
    parts = {name: {"accuracy": _share(marks), "n": float(len(marks))} for name, marks in judged.items()}
    return proportion([mark for marks in judged.values() for mark in marks], parts)


def measure_labels(predictions: Sequence[Prediction]) -> Measured:
    """Per cent of answers that `label_match` accepts."""
    return _accuracy(predictions, lambda p: label_match(p.prediction, p.target, p.labels))


def measure_exact(predictions: Sequence[Prediction]) -> Measured:
    """Per cent of answers that `exact_match` accepts."""
    return _accuracy(predictions, lambda p: exact_match(p.prediction, p.target))


def measure_vqa(predictions: Sequence[Prediction]) -> Measured:
    """100 times the mean VQA accuracy; the interval is bootstrapped over instances."""
    marks = np.array([vqa_accuracy(p.prediction, p.answers or (p.target,)) for p in predictions])
    if float(np.ptp(marks)) == 0.0:
        # Marks that are all alike have no spread to resample, which is no certainty; whole ones are a proportion.
        interval = wilson(round(float(marks.sum())), len(marks)).scaled(100)
    else:
        interval = percentile(100 * bootstrap_means(marks[:, None], np.random.default_rng(SEED))[:, 0])
    return Measured(100 * float(marks.mean()), interval, marks=marks)


def _mme_images(subtask: str, predictions: Sequence[Prediction]) -> Floats:
    """(images, 2): share of an image's two questions that are right, and 1 where both are."""
    images: dict[str, list[bool]] = defaultdict(list)
    for p in predictions:
        images[p.image_id].append(yes_no(p.prediction) == p.target.strip().lower())
    for image, marks in images.items():
        if len(marks) != 2:
            raise UserError(
                f"MME subtask {subtask}, image {image!r}: {len(marks)} questions, expected two; "
                "pairs are found by image_id, check that field in the data"
            )
    return np.array([(sum(marks) / 2, float(all(marks))) for marks in images.values()], dtype=np.float64)


def measure_mme(predictions: Sequence[Prediction]) -> Measured:
    """MME's total: sum over subtasks of 100 * accuracy + 100 * accuracy-plus, pairs by image_id, whatever the
    order.

    The interval is bootstrapped over images within each subtask; one with fewer than MME_MIN_IMAGES of them says
    nothing about its spread, and widens the interval by all that it could score. Raises UserError when an image
    has not two questions.
    """
    rng = np.random.default_rng(SEED)
    parts: Parts = {}
    total = np.zeros(RESAMPLES)
    unknown = 0
    for subtask, group in by_category(predictions).items():
        images = _mme_images(subtask, group)
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
    return Measured(sum(part["score"] for part in parts.values()), interval, parts)


def pope_numbers(answers: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and yes-ratio in per cent, "yes" being the positive class.

    Precision, recall and F1 are 0 where their denominator is. The yes-ratio is that of the answers.
    """
    pairs = list(zip(answers, targets, strict=True))
    hits = pairs.count(("yes", "yes"))
    said_yes, is_yes = sum(a == "yes" for a, _ in pairs), sum(t == "yes" for _, t in pairs)
    return {
        "accuracy": 100 * sum(a == t for a, t in pairs) / len(pairs),
        "precision": 100 * hits / said_yes if said_yes else 0.0,
        "recall": 100 * hits / is_yes if is_yes else 0.0,
        "f1": 200 * hits / (said_yes + is_yes) if said_yes + is_yes else 0.0,
        "yes_ratio": 100 * said_yes / len(pairs),
        "n": float(len(pairs)),
    }


def measure_pope(predictions: Sequence[Prediction]) -> Measured:
    """POPE's accuracy over all categories; its other numbers by category and over all under "all"."""

    def numbers(group: Sequence[Prediction]) -> dict[str, float]:
        return pope_numbers(
            [pope_answer(p.prediction) for p in group], [p.target.strip().lower() for p in group]
        )

    groups = by_category(predictions)
    parts = {name: numbers(group) for name, group in groups.items() if name}
    marks = [pope_answer(p.prediction) == p.target.strip().lower() for p in predictions]
    return proportion(marks, {**parts, "all": numbers(predictions)})


LABELS = Metric(
    "label match",
    "%",
    "accuracy: exact match after normalisation, or the target is the only label of the closed set that the "
    "answer names; Wilson interval",
    measure_labels,
)
EXACT = Metric(
    "exact match", "%", "accuracy: exact match after normalisation; Wilson interval", measure_exact
)
VQA = Metric(
    "VQA accuracy",
    "%",
    "VQA normalisation, then the mean over leave-one-out of min(matches / 3, 1); bootstrap interval over "
    "instances",
    measure_vqa,
)
MME = Metric(
    "MME",
    "points",
    "sum over subtasks of 100 * accuracy + 100 * accuracy-plus; yes/no by the official rule (first four "
    "characters), pairs by image; bootstrap interval over images",
    measure_mme,
)
POPE = Metric(
    "POPE",
    "%",
    "accuracy by the common parser (No, no or not in the first sentence means no, everything else yes); "
    "Wilson interval",
    measure_pope,
)
