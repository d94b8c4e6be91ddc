"""A seeded sample of instances with every model's answer, right and wrong ones of each benchmark."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mixlora_cli.benchmarks.registry import in_paper_order
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.report.evaluated import Evaluated

RIGHT = 0.5
"""A mark from which on an answer is shown as right; only VQA accuracy lies between 0 and 1."""
Outcome = Literal["right", "wrong", "differ"]
OUTCOMES: tuple[Outcome, ...] = ("wrong", "differ", "right")


@dataclass(frozen=True)
class Answer:
    """What one model said."""

    label: str
    text: str
    mark: float
    verdicts: tuple[tuple[str, str], ...]
    """Each judge's title and its verdict."""

    @property
    def right(self) -> bool:
        """Whether it counts as right here."""
        return self.mark >= RIGHT


@dataclass(frozen=True)
class Shown:
    """One instance of the sample."""

    column: str
    instance: Prediction
    answers: tuple[Answer, ...]

    @property
    def outcome(self) -> Outcome:
        """Whether all models were right, all wrong, or some of either."""
        rights = {answer.right for answer in self.answers}
        return "differ" if len(rights) == 2 else "right" if rights == {True} else "wrong"


def sample(runs: Sequence[Evaluated], size: int, seed: int) -> list[Shown]:
    """At most `size` instances of each outcome and benchmark (or seen task), in the order of the data.

    Only instances that all `runs` were asked alike. An instance's place in the lottery is a digest of the seed and its
    own name, so the order of the file changes nothing and no more than the sample is held.
    """
    kept: dict[tuple[str, str], dict[Outcome, list[tuple[int, int, Shown]]]] = {}
    for shown in _common(runs):
        instance = shown.instance
        group = kept.setdefault((instance.split, instance.benchmark), {outcome: [] for outcome in OUTCOMES})
        entry = (-_lot(instance, seed), -instance.index, shown)
        heapq.heappush(group[shown.outcome], entry)
        if len(group[shown.outcome]) > size:
            heapq.heappop(group[shown.outcome])  # the highest lot
    names = in_paper_order(sorted(name for split, name in kept if split == "unseen"))
    order = [("unseen", name) for name in names] + sorted(key for key in kept if key[0] == "heldout")
    return [
        shown
        for key in order
        for outcome in OUTCOMES
        for _, _, shown in sorted(kept[key][outcome], key=lambda entry: -entry[1])
    ]


def _lot(instance: Prediction, seed: int) -> int:
    name = f"{seed}:{instance.split}:{instance.benchmark}:{instance.index}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _common(runs: Sequence[Evaluated]) -> Iterator[Shown]:
    first, *others = runs
    elsewhere = [{p.key: p for p in other.predictions()} for other in others]
    for instance in first.predictions():
        same = [answers.get(instance.key) for answers in elsewhere]
        given = [p for p in same if p is not None and _asked(p) == _asked(instance)]
        if len(given) == len(others):
            pairs = zip(runs, [instance, *given], strict=True)
            yield Shown(first.column(instance), instance, tuple(_answer(run, p) for run, p in pairs))


def _asked(prediction: Prediction) -> tuple[str, str, str]:
    return prediction.question, prediction.target, prediction.image


def _answer(run: Evaluated, prediction: Prediction) -> Answer:
    return Answer(run.label, prediction.prediction, run.mark(prediction), run.verdicts(prediction))
