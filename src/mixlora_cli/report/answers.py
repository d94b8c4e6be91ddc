"""Single answers of evaluations: with score and verdicts, in a seeded sample, and counted in confusion matrices."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from mixlora_cli.benchmarks.metrics import EXACT, MME, POPE, Metric
from mixlora_cli.benchmarks.registry import benchmark_named, in_paper_order, seen_title
from mixlora_cli.benchmarks.scorers import exact_match, named_labels, normalise_answer, pope_answer, yes_no
from mixlora_cli.evaluation.predictions import Prediction, find_evaluation
from mixlora_cli.evaluation.results import Results
from mixlora_cli.evaluation.scoring import Evaluation, read_evaluation, score_evaluation
from mixlora_cli.judging.prompt import read_verdict
from mixlora_cli.judging.replies import Identity, Stored, all_replies, distinct_titles

RIGHT = 0.5
"""A score from which on an answer is shown as right; only VQA accuracy lies between 0 and 1."""
Outcome = Literal["right", "wrong", "differ"]
OUTCOMES: tuple[Outcome, ...] = ("wrong", "differ", "right")
UNREAD = "(other)"
"""Column of a confusion matrix for answers that name no label, or several."""
MOST_LABELS = 200
"""A larger set is no classification that a matrix could show."""


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation, its results, and what judges replied."""

    label: str
    evaluation: Evaluation
    results: Results
    judges: Sequence[Stored] = ()

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.evaluation.folder

    @property
    def count(self) -> int:
        """Answers."""
        return self.evaluation.header.count

    def verdicts(self, prediction: Prediction) -> tuple[tuple[str, str], ...]:
        """Title and verdict of each judge that has judged this answer."""
        found = [
            (title, stored.replies.get(identity.key(prediction)))
            for title, (stored, identity) in self._titled.items()
        ]
        return tuple((title, read_verdict(reply)) for title, reply in found if reply is not None)

    @cached_property
    def _titled(self) -> dict[str, tuple[Stored, Identity]]:
        """The judges by titles that tell them apart."""
        known = [(stored, stored.identity) for stored in self.judges]
        return dict(zip(distinct_titles([identity for _, identity in known]), known, strict=True))

    def metric(self, prediction: Prediction) -> Metric:
        """The rule that scores it."""
        if prediction.split == "heldout":
            return EXACT
        return benchmark_named(prediction.benchmark, self.results.about.get("benchmarks")).metric

    def column(self, prediction: Prediction) -> str:
        """Heading of its benchmark; of a seen task its title."""
        if prediction.split == "heldout":
            return f"Seen: {seen_title(prediction.benchmark)}"
        return benchmark_named(prediction.benchmark, self.results.about.get("benchmarks")).column


def read_evaluated(run: str | Path) -> Evaluated:
    """Score the evaluation in a folder anew and read what judges replied.

    Raises UserError when there is none, or it has not finished.
    """
    evaluation = read_evaluation(find_evaluation(run))
    return evaluated(evaluation, score_evaluation(evaluation))


def evaluated(evaluation: Evaluation, results: Results) -> Evaluated:
    """An evaluation that is scored already, with what judges replied."""
    return Evaluated(results.label, evaluation, results, all_replies(evaluation.folder))


@dataclass(frozen=True)
class Answer:
    """What one model said."""

    label: str
    text: str
    mark: float
    """What the rule gives to it, in [0, 1]; for MME whether it alone is right."""
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
    own name, so the order of the file changes nothing.
    """
    groups: dict[tuple[str, str], list[Shown]] = defaultdict(list)
    for shown in _common(runs):
        groups[shown.instance.split, shown.instance.benchmark].append(shown)
    names = in_paper_order(sorted(name for split, name in groups if split == "unseen"))
    order = [("unseen", name) for name in names] + sorted(key for key in groups if key[0] == "heldout")
    chosen: list[Shown] = []
    for key in order:
        for outcome in OUTCOMES:
            alike = [shown for shown in groups[key] if shown.outcome == outcome]
            drawn = sorted(alike, key=lambda shown: (_lot(shown.instance, seed), shown.instance.index))[:size]
            chosen += sorted(drawn, key=lambda shown: shown.instance.index)
    return chosen


def _lot(instance: Prediction, seed: int) -> int:
    name = f"{seed}:{instance.split}:{instance.benchmark}:{instance.index}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _common(runs: Sequence[Evaluated]) -> Iterator[Shown]:
    first, *others = runs
    elsewhere = [{each.key: each for each in other.evaluation.predictions} for other in others]

    def asked(prediction: Prediction) -> tuple[str, str, str]:
        return prediction.question, prediction.target, prediction.image

    for instance in first.evaluation.predictions:
        same = [answers.get(instance.key) for answers in elsewhere]
        given = [each for each in same if each is not None and asked(each) == asked(instance)]
        if len(given) == len(others):
            pairs = zip(runs, [instance, *given], strict=True)
            yield Shown(first.column(instance), instance, tuple(_answer(run, each) for run, each in pairs))


def _answer(run: Evaluated, prediction: Prediction) -> Answer:
    mark = run.evaluation.tasks[prediction.split, prediction.benchmark].by_index[prediction.index]
    return Answer(run.label, prediction.prediction, mark, run.verdicts(prediction))


@dataclass(frozen=True)
class Confusion:
    """How often each label was answered where each label was right."""

    column: str
    labels: tuple[str, ...]
    """Rows: the right answer. Columns: the label read in the given one, and last UNREAD."""
    counts: tuple[tuple[int, ...], ...]
    """(labels, labels + 1)."""

    def shares(self) -> list[list[float]]:
        """Counts as shares of their row, 0 in a row without instances."""
        return [[count / max(sum(row), 1) for count in row] for row in self.counts]

    def most_confused(self, count: int = 8) -> list[tuple[str, str, int]]:
        """The most frequent pairs of a right label and another answer, ties in the order of the labels."""
        answers = (*self.labels, UNREAD)
        pairs = [
            (right, answers[given], number)
            for place, (right, row) in enumerate(zip(self.labels, self.counts, strict=True))
            for given, number in enumerate(row)
            if number and given != place
        ]
        return sorted(pairs, key=lambda pair: -pair[2])[:count]


def confusions(run: Evaluated) -> list[Confusion]:
    """One for each benchmark whose instances share one closed set of labels, in the paper's order."""
    by_benchmark: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in run.evaluation.predictions:
        if prediction.split == "unseen":
            by_benchmark[prediction.benchmark].append(prediction)
    found = (_confusion(run, by_benchmark[name]) for name in in_paper_order(sorted(by_benchmark)))
    return [matrix for matrix in found if matrix is not None]


def _confusion(run: Evaluated, predictions: Sequence[Prediction]) -> Confusion | None:
    """None where the instances have no closed set of labels, or several."""
    metric = run.metric(predictions[0])
    closed = ("yes", "no") if metric in (MME, POPE) else None
    labels = closed or predictions[0].labels
    rows = [normalise_answer(label) for label in labels]
    if not 2 <= len(rows) <= MOST_LABELS:
        return None
    if any(frozenset(closed or each.labels) != frozenset(labels) for each in predictions):
        return None
    cells = Counter((normalise_answer(each.target), _label_read(metric, each)) for each in predictions)
    if any(right not in rows for right, _ in cells):
        return None
    counts = tuple(tuple(cells[row, given] for given in (*labels, UNREAD)) for row in rows)
    return Confusion(run.column(predictions[0]), labels, counts)


def _label_read(metric: Metric, prediction: Prediction) -> str:
    """The label that the metric reads in an answer, as the label set spells it; UNREAD for none or several."""
    if metric is POPE:
        return pope_answer(prediction.prediction)
    if metric is MME:
        found = yes_no(prediction.prediction)
        return UNREAD if found == "other" else found
    for label in prediction.labels:
        if exact_match(prediction.prediction, label):
            return label
    named = named_labels(prediction.prediction, prediction.labels)
    spelt = [label for label in prediction.labels if normalise_answer(label) in named]
    return spelt[0] if len(spelt) == 1 else UNREAD
