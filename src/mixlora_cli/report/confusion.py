"""Confusion matrices of benchmarks with a closed set of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mixlora_cli.benchmarks.registry import in_paper_order
from mixlora_cli.benchmarks.scorers import normalise_answer
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.report.evaluated import UNREAD, Evaluated, label_read, label_set

MOST_LABELS = 200
"""A larger set is no classification that a matrix could show."""


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


def confusions(evaluated: Evaluated) -> list[Confusion]:
    """One for each benchmark whose instances share one closed set of labels, in the paper's order."""
    counting: dict[str, _Counting] = {}
    for prediction in evaluated.predictions():
        if prediction.split == "unseen":
            counting.setdefault(prediction.benchmark, _Counting()).add(evaluated, prediction)
    return [matrix for name in in_paper_order(sorted(counting)) for matrix in counting[name].matrices()]


@dataclass
class _Counting:
    """Counts of one benchmark, as far as its instances share one closed set of labels."""

    column: str = ""
    labels: tuple[str, ...] = ()
    cells: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By the right answer, normalised, and the label that was read."""
    open: bool = False
    """Some instance had another set, or none."""

    def add(self, evaluated: Evaluated, prediction: Prediction) -> None:
        metric = evaluated.metric(prediction)
        labels = label_set(metric, prediction)
        if not self.labels:
            self.column, self.labels = evaluated.column(prediction), labels
        self.open = self.open or not labels or frozenset(labels) != frozenset(self.labels)
        if not self.open:
            self.cells[normalise_answer(prediction.target), label_read(metric, prediction)] += 1

    def matrices(self) -> Iterator[Confusion]:
        """The matrix, if there is one."""
        rows = [normalise_answer(label) for label in self.labels]
        if (
            self.open
            or not 2 <= len(rows) <= MOST_LABELS
            or any(right not in rows for right, _ in self.cells)
        ):
            return
        answers = (*self.labels, UNREAD)
        counts = tuple(tuple(self.cells[row, given] for given in answers) for row in rows)
        yield Confusion(self.column, self.labels, counts)
