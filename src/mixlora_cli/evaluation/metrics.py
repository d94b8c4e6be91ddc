"""The metrics: each is a name, a unit, the rule in words, and how answers are counted by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mixlora_cli.evaluation.pope_tally import PopeTally
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.scorers import exact_match, label_match, pope_right
from mixlora_cli.evaluation.tallies import AccuracyTally, GradedTally, Measured, MmeTally, Tally
from mixlora_cli.evaluation.vqa import vqa_accuracy

__all__ = ["EXACT", "LABELS", "METRICS", "MME", "POPE", "VQA", "Measured", "Metric"]


@dataclass(frozen=True)
class Metric:
    """A way to score a benchmark."""

    name: str
    unit: str
    rule: str
    """What made the number, in words, for whoever reads results.json."""
    tally: Callable[[], Tally]
    """An empty count."""
    mark: Callable[[Prediction], float] | None
    """One answer's mark in [0, 1]; None where marks of single answers do not make the score (MME)."""
    graded: bool = False
    """Marks may lie between 0 and 1."""

    def measure(self, predictions: Iterable[Prediction]) -> Measured:
        """Count them all, in any order."""
        tally = self.tally()
        for prediction in predictions:
            tally.add(prediction)
        return tally.measured()


def labels_right(prediction: Prediction) -> bool:
    """By `label_match`."""
    return label_match(prediction.prediction, prediction.target, prediction.labels)


def exactly_right(prediction: Prediction) -> bool:
    """By `exact_match`."""
    return exact_match(prediction.prediction, prediction.target)


def vqa_mark(prediction: Prediction) -> float:
    """By `vqa_accuracy`; an instance with a single answer has that one."""
    return vqa_accuracy(prediction.prediction, prediction.answers or (prediction.target,))


def pope_mark(prediction: Prediction) -> bool:
    """By `pope_right`."""
    return pope_right(prediction.prediction, prediction.target)


LABELS = Metric(
    "label match",
    "%",
    "accuracy: exact match after normalisation, or the target is the only label of the closed set that the "
    "answer names; Wilson interval",
    lambda: AccuracyTally(labels_right),
    labels_right,
)
EXACT = Metric(
    "exact match",
    "%",
    "accuracy: exact match after normalisation; Wilson interval",
    lambda: AccuracyTally(exactly_right),
    exactly_right,
)
VQA = Metric(
    "VQA accuracy",
    "%",
    "VQA normalisation, then the mean over leave-one-out of min(matches / 3, 1), with fewer than four "
    "references the share that matches; bootstrap interval over instances",
    lambda: GradedTally(vqa_mark),
    vqa_mark,
    graded=True,
)
MME = Metric(
    "MME",
    "points",
    "sum over subtasks of 100 * accuracy + 100 * accuracy-plus; yes/no by the official rule (first four "
    "characters), pairs by image; bootstrap interval over images",
    MmeTally,
    None,
)
POPE = Metric(
    "POPE",
    "%",
    "accuracy by the common parser (No, no or not in the first sentence means no, everything else yes); "
    "Wilson interval",
    PopeTally,
    pope_mark,
)

METRICS = {"labels": LABELS, "exact": EXACT, "vqa": VQA, "mme": MME, "pope": POPE}
"""By the names that a benchmark's YAML file uses."""
