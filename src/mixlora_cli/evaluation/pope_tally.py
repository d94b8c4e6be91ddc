"""Count POPE's answers, and the numbers that its authors report."""

from __future__ import annotations

from collections import Counter

from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.scorers import pope_answer
from mixlora_cli.evaluation.statistics import Interval, wilson
from mixlora_cli.evaluation.tallies import Categories, Measured, proportion

Pairs = Counter[tuple[str, str]]
"""How often each answer was given where each target was right."""


class PopeTally:
    """POPE's accuracy over all categories; its other numbers by category and over all under "all"."""

    def __init__(self) -> None:
        self._categories = Categories()
        self._pairs: dict[str, Pairs] = {}

    def add(self, prediction: Prediction) -> None:
        name = self._categories.note(prediction)
        pair = pope_answer(prediction.prediction), prediction.target.strip().lower()
        self._pairs.setdefault(name, Counter())[pair] += 1

    def measured(self) -> Measured:
        together: Pairs = sum(self._pairs.values(), Counter())
        parts = {name: pope_numbers(self._pairs[name]) for name in self._categories.ordered() if name}
        right = sum(count for (answer, target), count in together.items() if answer == target)
        marks = Counter({True: right, False: together.total() - right})
        return proportion(marks, {**parts, "all": pope_numbers(together)})


def pope_numbers(pairs: Pairs) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and yes-ratio in per cent, "yes" being the positive class, with their intervals.

    Precision, recall and F1 are 0 where their denominator is, and can then be anything. The yes-ratio is that of the
    answers. `low` and `high` are the accuracy's ends, `precision_low` and so on the others'.
    """
    total, hits = pairs.total(), pairs["yes", "yes"]
    said_yes = sum(count for (answer, _), count in pairs.items() if answer == "yes")
    is_yes = sum(count for (_, target), count in pairs.items() if target == "yes")
    right = sum(count for (answer, target), count in pairs.items() if answer == target)
    return {
        **_with_ends("accuracy", "", _share(right, total), _wilson(right, total)),
        **_with_ends("precision", "precision_", _share(hits, said_yes), _wilson(hits, said_yes)),
        **_with_ends("recall", "recall_", _share(hits, is_yes), _wilson(hits, is_yes)),
        **_with_ends("f1", "f1_", _share(2 * hits, said_yes + is_yes), _f1_interval(hits, said_yes, is_yes)),
        **_with_ends("yes_ratio", "yes_ratio_", _share(said_yes, total), _wilson(said_yes, total)),
        "n": float(total),
    }


def _share(count: int, total: int) -> float:
    return 100 * count / total if total else 0.0


def _wilson(count: int, total: int) -> Interval:
    return (wilson(count, total) if total else Interval(0.0, 1.0)).scaled(100)


def _f1_interval(hits: int, said_yes: int, is_yes: int) -> Interval:
    """F1 = 2 J / (1 + J) with J = hits / (said or is yes), which is a proportion: Wilson's interval of J, mapped."""
    share = _wilson(hits, said_yes + is_yes - hits).scaled(1 / 100)
    return Interval(*(200 * end / (1 + end) for end in (share.low, share.high)))


def _with_ends(name: str, prefix: str, value: float, interval: Interval) -> dict[str, float]:
    return {name: value, f"{prefix}low": interval.low, f"{prefix}high": interval.high}
