"""How the static adapter fares beside the base and the MixLoRA adapter, with 95 % intervals and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mixlora_cli.analysis.export.exam import Answers
from mixlora_cli.evaluation.metrics import EXACT
from mixlora_cli.evaluation.scorers import exact_match
from mixlora_cli.evaluation.scoring import score_predictions
from mixlora_cli.stats import SEED, Floats, bootstrap_means, wilson

BASE, MIXLORA, STATIC = "base", "mixlora", "static"
KINDS = (BASE, MIXLORA, STATIC)
"""What is compared: no adapter, the MixLoRA adapter, the static LoRA made of it."""
ByTask = Mapping[str, Answers]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, of n instances."""

    value: float
    low: float
    high: float
    n: int

    def scaled(self, factor: float) -> Estimate:
        """Value and interval times `factor`."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.n)


@dataclass(frozen=True)
class Measure:
    """By adapter kind and by task, and the paired difference static - mixlora; "" stands for the mean over tasks."""

    name: str
    unit: str
    rule: str
    kinds: Mapping[str, Mapping[str, Estimate]]
    difference: Mapping[str, Estimate]


def compare(answers: Mapping[str, ByTask]) -> tuple[Measure, Measure]:
    """Exact match and answer loss of every kind, all on the same instances: answers by kind and task."""
    return _exact_match(answers), _answer_loss(answers)


def mean_over_tasks(tasks: Sequence[Floats]) -> Estimate:
    """Mean over tasks of a ratio of sums: each task is rows (n, 2) of numerator and denominator.

    The interval resamples the instances within each task. Rows that are all one whole number have no spread to
    resample, which is no certainty: they are taken as a proportion that is 0 or 1 (Wilson).
    """
    value = float(np.mean([rows[:, 0].sum() / rows[:, 1].sum() for rows in tasks]))
    count = sum(map(len, tasks))
    numerators = np.concatenate([rows[:, 0] for rows in tasks])
    if np.ptp(numerators) == 0 and numerators[0] in (-1.0, 0.0, 1.0):
        low, high = _of_one_value(float(numerators[0]), count)
    else:
        rng = np.random.default_rng(SEED)
        samples = [bootstrap_means(rows, rng) for rows in tasks]
        ratios = np.mean([sums[:, 0] / sums[:, 1] for sums in samples], axis=0)
        low, high = (float(end) for end in np.percentile(ratios, (2.5, 97.5)))
    return Estimate(value, low, high, count)


def _of_one_value(value: float, count: int) -> tuple[float, float]:
    """Interval of a mean of n differences of marks that are all 0, 1 or -1."""
    unseen = wilson(0, count).high or 0.0
    return max(value - unseen, -1.0), min(value + unseen, 1.0)


def _each_and_all(rows: Mapping[str, Floats]) -> dict[str, Estimate]:
    each = {task: mean_over_tasks([values]) for task, values in rows.items()}
    return {**each, "": mean_over_tasks(list(rows.values()))}


def _exact_match(answers: Mapping[str, ByTask]) -> Measure:
    kinds = {kind: _match_of(by_task) for kind, by_task in answers.items()}
    marks = {kind: {task: _marks(a) for task, a in by_task.items()} for kind, by_task in answers.items()}
    changes = {
        task: np.stack([static - marks[MIXLORA][task], np.ones(len(static))], axis=1)
        for task, static in marks[STATIC].items()
    }
    difference = {task: estimate.scaled(100) for task, estimate in _each_and_all(changes).items()}
    return Measure(
        "exact match", "%", f"{EXACT.rule}; mean over tasks: bootstrap interval", kinds, difference
    )


def _match_of(by_task: ByTask) -> dict[str, Estimate]:
    """Per cent right by task and, under "", their mean."""
    predictions = [prediction for answers in by_task.values() for prediction in answers.predictions]
    seen = score_predictions(predictions, {}).seen
    assert seen is not None  # there is at least one held-out instance
    parts = {
        task: Estimate(part["accuracy"], part["low"], part["high"], int(part["n"]))
        for task, part in seen.parts.items()
    }
    return {**{task: parts[task] for task in by_task}, "": Estimate(seen.value, seen.low, seen.high, seen.n)}


def _marks(answers: Answers) -> Floats:
    return np.array([exact_match(p.prediction, p.target) for p in answers.predictions], dtype=np.float64)


def _answer_loss(answers: Mapping[str, ByTask]) -> Measure:
    losses = {kind: {task: a.losses for task, a in by_task.items()} for kind, by_task in answers.items()}
    kinds = {kind: _each_and_all(by_task) for kind, by_task in losses.items()}
    changes = {
        task: np.stack([static[:, 0] - losses[MIXLORA][task][:, 0], static[:, 1]], axis=1)
        for task, static in losses[STATIC].items()
    }
    rule = (
        "cross entropy of the true answer's tokens, summed over instances, by their number; bootstrap interval over "
        "instances within tasks"
    )
    return Measure("answer loss", "nats a token", rule, kinds, _each_and_all(changes))
