"""Scores from a predictions file alone: no model, no data, so it reruns in seconds.

Predictions are gone through one at a time; what is kept of them are counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mixlora_cli.evaluation import results as result_files
from mixlora_cli.evaluation.benchmarks import AVERAGED, MEAN_TITLE, Benchmark, benchmark_named, in_paper_order
from mixlora_cli.evaluation.folder import check_finished, open_evaluation
from mixlora_cli.evaluation.metrics import EXACT
from mixlora_cli.evaluation.mme_files import OfficialFiles
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.results import Results, Score
from mixlora_cli.evaluation.scorers import normalise_answer
from mixlora_cli.evaluation.statistics import SEED, percentile
from mixlora_cli.evaluation.tallies import Marks, Tally, mean_of, resampled
from mixlora_cli.judging.replies import FOLDER as REPLIES
from mixlora_cli.judging.scores import judged_scores

SEEN_NAME = "seen"
SEEN_TITLE = "Seen"
MME_FOLDER = "official"
"""Subfolder of MME's own text files: official/<benchmark>/<subtask>.txt."""


def mean_score(marks: Sequence[Marks], name: str, column: str, rule: str, parts: Mapping[str, Any]) -> Score:
    """Mean of several accuracies in per cent; the interval resamples the instances within each of them."""
    rng = np.random.default_rng(SEED)
    interval = percentile(np.mean([100 * resampled(each, rng) for each in marks], axis=0))
    value = 100 * float(np.mean([mean_of(each) for each in marks]))
    count = sum(sum(each.values()) for each in marks)
    return Score(name, column, value, interval.low, interval.high, count, "%", rule, parts)


class _Unseen:
    """Counts of one benchmark."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
        self.tally: Tally = benchmark.metric.tally()
        self.count = 0

    def add(self, prediction: Prediction) -> None:
        self.tally.add(prediction)
        self.count += 1

    def score(self) -> tuple[Score, Marks]:
        metric, found = self.benchmark.metric, self.tally.measured()
        low, high = found.interval.low, found.interval.high
        names = self.benchmark.name, self.benchmark.column
        return Score(
            *names, found.value, low, high, self.count, metric.unit, metric.rule, found.parts
        ), found.marks


class _Seen:
    """Counts of one seen task."""

    def __init__(self) -> None:
        self.tally: Tally = EXACT.tally()
        self.targets: Counter[str] = Counter()

    def add(self, prediction: Prediction) -> None:
        self.tally.add(prediction)
        self.targets[normalise_answer(prediction.target)] += 1

    def part(self) -> tuple[dict[str, float], Marks]:
        """`most_frequent` is per cent right of always giving the answer that is most frequent in this very group: what
        chance can reach.
        """
        found, count = self.tally.measured(), self.targets.total()
        ((_, frequent),) = self.targets.most_common(1)
        part = {
            "accuracy": found.value,
            "low": found.interval.low,
            "high": found.interval.high,
            "n": float(count),
            "most_frequent": 100 * frequent / count,
        }
        return part, found.marks


def _seen_score(tasks: Mapping[str, _Seen]) -> Score:
    found = {task: tasks[task].part() for task in sorted(tasks)}
    rule = (
        "mean over the seen tasks of exact match after normalisation; bootstrap interval over instances "
        "within tasks"
    )
    parts = {task: part for task, (part, _) in found.items()}
    return mean_score([marks for _, marks in found.values()], SEEN_NAME, SEEN_TITLE, rule, parts)


def score_predictions(predictions: Iterable[Prediction], about: Mapping[str, Any]) -> Results:
    """Score each benchmark, then MMAvg and the seen tasks. The order of `predictions` changes nothing.

    `about["benchmarks"]` describes those of the user's own, see `benchmark_named`.
    """
    unseen: dict[str, _Unseen] = {}
    seen: dict[str, _Seen] = {}
    for prediction in predictions:
        name = prediction.benchmark
        if prediction.split == "heldout":
            (seen.get(name) or seen.setdefault(name, _Seen())).add(prediction)
            continue
        if name not in unseen:
            unseen[name] = _Unseen(benchmark_named(name, about.get("benchmarks")))
        unseen[name].add(prediction)
    scored = [unseen[name].score() for name in in_paper_order(sorted(unseen))]
    marks = {score.column: found for score, found in scored}
    mean = None
    if all(column in marks for column in AVERAGED):
        rule = f"mean of {', '.join(AVERAGED)}; bootstrap interval over instances within benchmarks"
        averaged = [marks[column] for column in AVERAGED]
        mean = mean_score(averaged, MEAN_TITLE.lower(), MEAN_TITLE, rule, {})
    return Results(about, tuple(score for score, _ in scored), mean, _seen_score(seen) if seen else None)


def score(folder: Path) -> Results:
    """Score the predictions in `folder` and write `results.json` beside them; for MME also the official tool's files.

    Raises UserError when there are none or the evaluation has not finished.
    """
    header, reader = open_evaluation(folder)
    about = {**header.about, "fingerprint": dict(header.fingerprint)}
    own = about.get("benchmarks")
    with OfficialFiles(own) as official:
        results = score_predictions(official.passing(reader), about)
        check_finished(folder, header, reader)
        official.write(folder / MME_FOLDER)
    if any((folder / REPLIES).glob("*.jsonl")):
        results = replace(results, judged=judged_scores(folder, open_evaluation(folder)[1], own))
    result_files.write_results(results, folder / result_files.FILE_NAME)
    return results
