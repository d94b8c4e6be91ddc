"""The metrics: how one answer is scored, and what a benchmark's score, its interval and its parts are made of."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import ClassVar, Literal

import numpy as np

from mixlora_cli.benchmarks.scorers import (
    exact_match,
    label_match,
    mme_right,
    pope_answer,
    pope_right,
    vqa_accuracy,
)
from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.stats import (
    RESAMPLES,
    SEED,
    Estimate,
    Floats,
    bootstrap_means,
    bootstrap_ratios,
    percentile,
    wilson,
)

Parts = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Measured:
    """A benchmark's score in the metric's unit, with the numbers of each subtask or category."""

    score: Estimate
    parts: Parts = field(default_factory=dict)


def per_cent(right: int, count: int) -> Estimate:
    """Per cent right with Wilson's interval; 0, and nothing known of it, where there is nothing to count."""
    if not count:
        return Estimate(0.0, 0.0, 100.0)
    return replace(wilson(right, count).scaled(100), value=100 * right / count)


def mean_of(scores: Floats) -> float:
    """Mean of scores (n,), the same whatever order they come in."""
    return math.fsum(value * count for value, count in Counter(scores.tolist()).items()) / len(scores)


def mean_over(groups: Sequence[Floats]) -> Estimate:
    """Mean over groups of their mean score (n_i,), in per cent; instances are drawn anew within each group.

    Where all are right, or all wrong, no draw differs from another: there the interval is Wilson's for them together.
    """
    scores = np.concatenate(groups)
    if scores.min() == scores.max() and scores[0] in (0, 1):
        return wilson(int(scores.sum()), len(scores)).scaled(100)
    rng = np.random.default_rng(SEED)
    samples = np.mean([100 * bootstrap_means(each[:, None], rng)[:, 0] for each in groups], axis=0)
    return percentile(100 * float(np.mean([mean_of(each) for each in groups])), samples)


class InstanceScores:
    """One benchmark's answers with their scores, 0 or 1; the benchmark's score is per cent right."""

    unit: ClassVar[str] = "%"
    scale: ClassVar[float] = 100.0
    """What `value` and `units` are multiplied by."""
    right_or_wrong: ClassVar[bool] = True
    """Whether the score is the share of right answers, for which there are exact tests."""
    is_sum: ClassVar[bool] = False
    """Whether the score is a sum over the groups of `units`."""
    questions_per_image: ClassVar[int] = 0
    """How many questions there must be about each picture of a subtask; 0: any number."""

    def __init__(self, score: Callable[[Prediction], float]) -> None:
        self._score = score
        self.predictions: dict[int, Prediction] = {}
        self.by_index: dict[int, float] = {}

    def update(self, predictions: Iterable[Prediction]) -> InstanceScores:
        """Score further answers, in any order, each instance once."""
        for prediction in predictions:
            self.predictions[prediction.index] = prediction
            self.by_index[prediction.index] = float(self._score(prediction))
        return self

    def compute(self) -> Measured:
        """The score with Wilson's interval; that of each category too where there are several."""
        groups = self.by_category(self.by_index)
        parts: Parts = {}
        for name, indices in groups.items() if len(groups) > 1 else ():
            parts[name] = {**with_ends("accuracy", self._accuracy(indices)), "n": float(len(indices))}
        return Measured(self._accuracy(self.by_index), parts)

    def value(self, indices: Sequence[int]) -> float:
        """The score on chosen instances, by `scale`."""
        return fmean(self.by_index[index] for index in indices)

    def units(self, indices: Sequence[int]) -> list[Floats]:
        """Groups of what a bootstrap draws anew (n,): the score is `scale` times their mean, or the means' sum."""
        return [self.array(indices)]

    def minus(self, other: InstanceScores, indices: Sequence[int]) -> list[Floats]:
        """Groups of differences to another model's answers to the same instances, as `compare_means` takes them."""
        pairs = zip(self.units(indices), other.units(indices), strict=True)
        return [ours - theirs for ours, theirs in pairs]

    def array(self, indices: Iterable[int] | None = None) -> Floats:
        """Scores (n,) of chosen instances, or of all."""
        chosen = self.by_index if indices is None else indices
        return np.array([self.by_index[index] for index in chosen], dtype=np.float64)

    def by_category(self, indices: Iterable[int]) -> dict[str, list[int]]:
        """Indices by category, both in the order of the data."""
        groups: dict[str, list[int]] = {}
        for index in sorted(indices):
            groups.setdefault(self.predictions[index].category, []).append(index)
        return groups

    def official_files(self) -> dict[str, str]:
        """Texts by file name that the benchmark's own tool reads; none where it has no such tool."""
        return {}

    def _accuracy(self, indices: Collection[int]) -> Estimate:
        return per_cent(int(sum(self.by_index[index] for index in indices)), len(indices))


def with_ends(name: str, found: Estimate, prefix: str = "") -> dict[str, float]:
    """A number and the ends of its interval, as parts of a score hold them."""
    assert found.value is not None and found.low is not None and found.high is not None
    return {name: found.value, f"{prefix}low": found.low, f"{prefix}high": found.high}


class GradedScores(InstanceScores):
    """Scores in [0, 1]: 100 times their mean; the interval is bootstrapped over instances."""

    right_or_wrong = False

    def compute(self) -> Measured:
        """Scores that are all alike have no spread to resample, which is no certainty: Wilson's interval."""
        scores = self.array()
        mean, count = mean_of(scores), len(scores)
        if len(set(scores.tolist())) == 1:
            return Measured(replace(wilson(round(mean * count), count).scaled(100), value=100 * mean))
        samples = bootstrap_means(scores[:, None], np.random.default_rng(SEED))[:, 0]
        return Measured(percentile(100 * mean, 100 * samples))


class PopeScores(InstanceScores):
    """POPE's accuracy over all categories; its other numbers by category, and over all under "all"."""

    def compute(self) -> Measured:
        groups = {name: indices for name, indices in self.by_category(self.by_index).items() if name}
        parts = {name: pope_numbers(self._pairs(indices)) for name, indices in groups.items()}
        parts["all"] = pope_numbers(self._pairs(self.by_index))
        return Measured(self._accuracy(self.by_index), parts)

    def _pairs(self, indices: Iterable[int]) -> Counter[tuple[str, str]]:
        answered = (self.predictions[index] for index in indices)
        return Counter((pope_answer(each.prediction), each.target.strip().lower()) for each in answered)


def pope_numbers(pairs: Counter[tuple[str, str]]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and yes-ratio in per cent, "yes" being the positive class, with their intervals.

    Precision, recall and F1 are 0 where their denominator is, and can then be anything. The yes-ratio is that of the
    answers. `low` and `high` are the accuracy's ends, `precision_low` and so on the others'.

    Args:
        pairs: how often each answer was given where each target was right.
    """
    total, hits = pairs.total(), pairs["yes", "yes"]
    said_yes = sum(count for (answer, _), count in pairs.items() if answer == "yes")
    is_yes = sum(count for (_, target), count in pairs.items() if target == "yes")
    right = sum(count for (answer, target), count in pairs.items() if answer == target)
    # F1 = 2 J / (1 + J) with J = hits / (said or is yes), which is a proportion: Wilson's interval of J, mapped.
    shares = with_ends("", per_cent(hits, said_yes + is_yes - hits).scaled(1 / 100))
    f1 = 100 * 2 * hits / (said_yes + is_yes) if said_yes + is_yes else 0.0
    ends = (200 * shares[end] / (1 + shares[end]) for end in ("low", "high"))
    return {
        **with_ends("accuracy", per_cent(right, total)),
        **with_ends("precision", per_cent(hits, said_yes), "precision_"),
        **with_ends("recall", per_cent(hits, is_yes), "recall_"),
        **with_ends("f1", Estimate(f1, *ends), "f1_"),
        **with_ends("yes_ratio", per_cent(said_yes, total), "yes_ratio_"),
        "n": float(total),
    }


PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_HALVES = {"perception": PERCEPTION, "cognition": COGNITION}
SUBTASK_POINTS = 200.0
"""What one of MME's subtasks can give."""
_MIN_IMAGES = 3


class MmeScores(InstanceScores):
    """MME's total: over subtasks the sum of 100 * accuracy + 100 * accuracy-plus, pairs by image_id.

    The interval is bootstrapped over images within each subtask; one with fewer than `_MIN_IMAGES` of them says
    nothing about its spread, and widens the interval by all that it could score.
    """

    unit = "points"
    right_or_wrong = False
    is_sum = True
    questions_per_image = 2

    def compute(self) -> Measured:
        """Raises UserError when an image has not two questions."""
        rng = np.random.default_rng(SEED)
        parts: Parts = {}
        samples: dict[str, Floats | None] = {}
        for subtask, images in self._images(self.by_index).items():
            few = len(images) < _MIN_IMAGES
            samples[subtask] = None if few else 100 * bootstrap_means(images, rng).sum(axis=1)
            parts[subtask] = _subtask(images, samples[subtask])
        halves: Parts = {}
        for half, names in _HALVES.items():
            if all(name in parts for name in names):
                own = {name: found for name, found in samples.items() if name in names}
                score = sum(parts[name]["score"] for name in names)
                halves[half] = with_ends("score", _sum_of(score, own.values()))
        total = sum(part["score"] for part in parts.values())
        return Measured(_sum_of(total, samples.values()), {**parts, **halves})

    def value(self, indices: Sequence[int]) -> float:
        return sum(float(points.mean(axis=0).sum()) for points in self._images(indices).values())

    def units(self, indices: Sequence[int]) -> list[Floats]:
        """For each subtask (images,): an image's accuracy plus accuracy-plus, in [0, 2]."""
        return [points.sum(axis=1) for _, points in sorted(self._images(indices).items())]

    def _images(self, indices: Iterable[int]) -> dict[str, Floats]:
        """By subtask (images, 2): share of an image's two questions that are right, and 1 where both are."""
        found: dict[str, Floats] = {}
        for subtask, chosen in self.by_category(indices).items():
            images: dict[str, list[bool]] = {}
            for index in chosen:
                images.setdefault(self.predictions[index].image_id, []).append(bool(self.by_index[index]))
            for image, right in images.items():
                if len(right) != 2:
                    raise UserError(
                        f"MME subtask {cut(subtask)}, image {cut(repr(image))}: {len(right)} questions, "
                        "expected two; pairs are found by image_id, check that field in the data"
                    )
            found[subtask] = np.array(
                [(sum(right) / 2, all(right)) for right in images.values()], dtype=np.float64
            )
        return found

    def official_files(self) -> dict[str, str]:
        """What the authors' `calculation.py` reads in its `--results_dir`: `<subtask>.txt` for each subtask.

        A line is image, question, ground truth, prediction, separated by tabs; the two lines of an image stand
        together. Tabs and line breaks inside a field become spaces, one for one: the tool reads the first four
        characters.
        """
        groups = self.by_category(self.by_index)
        texts: dict[str, str] = {}
        for subtask, name in safe_names(sorted(groups)).items():
            images: dict[str, list[str]] = {}
            for index in groups[subtask]:
                each = self.predictions[index]
                target = each.target.strip().capitalize()
                fields = [
                    text.translate(_BREAKS)
                    for text in (each.image_id, each.question, target, each.prediction)
                ]
                images.setdefault(fields[0], []).append("\t".join(fields) + "\n")
            texts[f"{name}.txt"] = "".join(line for lines in images.values() for line in lines)
        return texts


def _subtask(images: Floats, samples: Floats | None) -> dict[str, float]:
    """Numbers of one subtask, from its images' (images, 2) and the bootstrap samples of its score (RESAMPLES,).

    Images that are all alike have no spread to resample, which is no certainty: as many of them as Wilson's interval
    leaves open may be of any other kind.
    """
    accuracy, plus = (float(mean) for mean in 100 * images.mean(axis=0))
    score, count = accuracy + plus, len(images)
    if samples is None:
        found = Estimate(score, 0.0, SUBTASK_POINTS)
    elif (images == images[0]).all():
        alike = wilson(count, count).low or 0.0
        found = Estimate(score, score * alike, score + (SUBTASK_POINTS - score) * (1 - alike))
    else:
        found = percentile(score, samples)
    shares = {"accuracy": accuracy, "accuracy_plus": plus}
    return {**with_ends("score", found), **shares, "images": float(count)}


def _sum_of(value: float, samples: Iterable[Floats | None]) -> Estimate:
    """A sum of subtasks; one without samples may have scored anything."""
    samples = list(samples)
    known = sum((each for each in samples if each is not None), start=np.zeros(RESAMPLES))
    found = percentile(value, known)
    return replace(found, high=(found.high or 0.0) + SUBTASK_POINTS * sum(each is None for each in samples))


def subtasks_in(parts: Iterable[str]) -> list[str]:
    """Names of the subtasks among the parts of an MME score, without the sums of its halves."""
    return [name for name in parts if name not in _HALVES]


_BREAKS = str.maketrans({mark: " " for mark in "\t\n\r"})
_NAME_LENGTH = 60
"""Characters; file systems take 255 bytes, and a character may have four."""


def safe_names(names: Iterable[str]) -> dict[str, str]:
    """A file name (without ending) for each subtask or benchmark: MME's own names stay as they are.

    What is no letter, digit, dot, hyphen or underscore becomes a hyphen; no name begins with a dot, is empty, or
    differs from another in case alone.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        stem = re.sub(r"[^\w.-]+", "-", name)[:_NAME_LENGTH].lstrip(".") or "unnamed"
        free, number = stem, 1
        while free.casefold() in taken:
            number += 1
            free = f"{stem}-{number}"
        taken.add(free.casefold())
        found[name] = free
    return found


class LossScores(InstanceScores):
    """Losses of one seen task's held-out instances: nats of all their answers' tokens over the number of these.

    A ratio of sums: each token weighs the same. Lower is better. The interval is bootstrapped over instances.
    """

    unit = "nats"
    scale = 1.0
    right_or_wrong = False

    def __init__(self) -> None:
        super().__init__(lambda prediction: prediction.nll or 0.0)

    def compute(self) -> Measured:
        return Measured(mean_loss([self]))

    def value(self, indices: Sequence[int]) -> float:
        nats, tokens = self.pairs(indices).sum(axis=0)
        return float(nats / tokens)

    def minus(self, other: InstanceScores, indices: Sequence[int]) -> list[Floats]:
        """Differences in nats, and how many tokens they are of (n, 2).

        Raises UserError where these are not as many for both: a loss per token of other tokens is another quantity.
        """
        assert isinstance(other, LossScores)
        ours, theirs = self.pairs(indices), other.pairs(indices)
        if (ours[:, 1] != theirs[:, 1]).any():
            raise UserError("the same answers have other tokens in each: losses per token cannot be compared")
        return [np.column_stack([ours[:, 0] - theirs[:, 0], ours[:, 1]])]

    def pairs(self, indices: Iterable[int] | None = None) -> Floats:
        """Nats and tokens (n, 2) of chosen instances, or of all, in the order of the data."""
        chosen = sorted(self.by_index if indices is None else indices)
        found = [(self.by_index[index], self.predictions[index].tokens or 0) for index in chosen]
        return np.array(found, dtype=np.float64)


def mean_loss(tasks: Sequence[LossScores]) -> Estimate:
    """Mean over tasks of their loss per token; instances are drawn anew within each.

    Without an interval where a task has a single instance, which says nothing of its spread.
    """
    pairs = [each.pairs() for each in tasks]
    value = float(np.mean([each[:, 0].sum() / each[:, 1].sum() for each in pairs]))
    if min(map(len, pairs)) < 2:
        return Estimate(value)
    rng = np.random.default_rng(SEED)
    return percentile(value, np.mean([bootstrap_ratios(each, rng) for each in pairs], axis=0))


@dataclass(frozen=True)
class Metric:
    """A way to score a benchmark."""

    name: str
    rule: str
    """What made the number, in words, for whoever reads results.json."""
    score: Callable[[Prediction], float]
    """One answer's score in [0, 1]."""
    aggregate: type[InstanceScores] = InstanceScores
    """What the benchmark's score is made of them."""
    compares_with: Literal["a text", "a label", "yes or no", "references"] = "a text"
    """What must be known of an instance for an answer to be right."""

    def scores(self, predictions: Iterable[Prediction] = ()) -> InstanceScores:
        """The answers with their scores."""
        return self.aggregate(self.score).update(predictions)


LABELS = Metric(
    "label match",
    "accuracy: exact match after normalisation, or the target is the only label of the closed set that the "
    "answer names; Wilson interval",
    lambda p: label_match(p.prediction, p.target, p.labels),
    compares_with="a label",
)
EXACT = Metric(
    "exact match",
    "accuracy: exact match after normalisation; Wilson interval",
    lambda p: exact_match(p.prediction, p.target),
)
VQA = Metric(
    "VQA accuracy",
    "VQA normalisation, then the mean over leave-one-out of min(matches / 3, 1), with fewer than four "
    "references the share that matches; bootstrap interval over instances",
    lambda p: vqa_accuracy(p.prediction, p.answers or (p.target,)),
    GradedScores,
    "references",
)
MME = Metric(
    "MME",
    "sum over subtasks of 100 * accuracy + 100 * accuracy-plus; yes/no by the official rule (first four "
    "characters), pairs by image; bootstrap interval over images",
    lambda p: mme_right(p.prediction, p.target),
    MmeScores,
    "yes or no",
)
POPE = Metric(
    "POPE",
    "accuracy by the common parser (No, no or not in the first sentence means no, everything else yes); "
    "Wilson interval",
    lambda p: pope_right(p.prediction, p.target),
    PopeScores,
    "yes or no",
)

METRICS: Mapping[str, Metric] = {"labels": LABELS, "exact": EXACT, "vqa": VQA, "mme": MME, "pope": POPE}
"""By the names that a benchmark's YAML file uses."""
