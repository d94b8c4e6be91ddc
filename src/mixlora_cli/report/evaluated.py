"""One evaluation as the report needs it: scores, and its answers one at a time with mark and verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mixlora_cli.benchmarks.metrics import EXACT, MME, POPE, Metric
from mixlora_cli.benchmarks.registry import benchmark_named, seen_title
from mixlora_cli.benchmarks.scorers import exact_match, named_labels, normalise_answer, pope_answer, yes_no
from mixlora_cli.evaluation.predictions import Prediction, find_evaluation
from mixlora_cli.evaluation.results import Results
from mixlora_cli.evaluation.scoring import Evaluation, read_evaluation, score_evaluation
from mixlora_cli.judging.prompt import read_verdict
from mixlora_cli.judging.replies import Identity, Stored, all_replies, distinct_titles

UNREAD = "(other)"
"""Column of a confusion matrix for answers that name no label, or several."""
YES_NO = ("yes", "no")


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

    def predictions(self) -> Iterator[Prediction]:
        """All answers, in the order of the file."""
        return iter(self.evaluation.predictions)

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

    def mark(self, prediction: Prediction) -> float:
        """What the rule gives to this one answer, in [0, 1]; for MME whether it alone is right."""
        return self.evaluation.tasks[prediction.split, prediction.benchmark].by_index[prediction.index]


def read_evaluated(run: str | Path) -> Evaluated:
    """Score the evaluation in a folder anew and read what judges replied.

    Raises UserError when there is none, or it has not finished.
    """
    evaluation = read_evaluation(find_evaluation(run))
    return evaluated(evaluation, score_evaluation(evaluation))


def evaluated(evaluation: Evaluation, results: Results) -> Evaluated:
    """An evaluation that is scored already, with what judges replied."""
    return Evaluated(results.label, evaluation, results, all_replies(evaluation.folder))


def label_set(metric: Metric, prediction: Prediction) -> tuple[str, ...]:
    """The closed set that an answer is one of; () for free answers."""
    return YES_NO if metric in (MME, POPE) else prediction.labels


def label_read(metric: Metric, prediction: Prediction) -> str:
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
