"""Scores from a predictions file alone: no model, no data, so it reruns in seconds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mixlora_cli.evaluation import results as result_files
from mixlora_cli.evaluation.benchmarks import AVERAGED, MEAN_TITLE, benchmark_named, in_paper_order
from mixlora_cli.evaluation.folder import read_finished
from mixlora_cli.evaluation.metrics import EXACT, Measured, Metric
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.results import Results, Score
from mixlora_cli.evaluation.scorers import normalise_answer
from mixlora_cli.evaluation.statistics import SEED, Floats, bootstrap_means, percentile
from mixlora_cli.judging.scores import judged_scores

SEEN_NAME = "seen"
SEEN_TITLE = "Seen"


def _score(name: str, column: str, metric: Metric, measured: Measured, n: int) -> Score:
    interval = measured.interval
    return Score(
        name, column, measured.value, interval.low, interval.high, n, metric.unit, metric.rule, measured.parts
    )


def _mean_of(marks: Sequence[Floats], name: str, column: str, rule: str, parts: Mapping[str, Any]) -> Score:
    """Mean of several accuracies in per cent; the interval resamples the instances within each of them."""
    rng = np.random.default_rng(SEED)
    samples = np.mean([100 * bootstrap_means(each[:, None], rng)[:, 0] for each in marks], axis=0)
    interval = percentile(samples)
    value = 100 * float(np.mean([each.mean() for each in marks]))
    return Score(name, column, value, interval.low, interval.high, sum(map(len, marks)), "%", rule, parts)


def _benchmark_scores(groups: Mapping[str, list[Prediction]]) -> tuple[list[Score], dict[str, Floats]]:
    """A score for each benchmark, and the instances' marks by column."""
    scores: list[Score] = []
    marks: dict[str, Floats] = {}
    for name in in_paper_order(groups):
        benchmark = benchmark_named(name)
        measured = benchmark.metric.measure(groups[name])
        scores.append(_score(name, benchmark.column, benchmark.metric, measured, len(groups[name])))
        marks[benchmark.column] = measured.marks
    return scores, marks


def _seen_score(groups: Mapping[str, list[Prediction]]) -> Score:
    measured = {task: EXACT.measure(group) for task, group in sorted(groups.items())}
    parts = {
        task: {
            "accuracy": m.value,
            "low": m.interval.low,
            "high": m.interval.high,
            "n": float(len(m.marks)),
            "most_frequent": _most_frequent(groups[task]),
        }
        for task, m in measured.items()
    }
    rule = (
        "mean over the seen tasks of exact match after normalisation; bootstrap interval over instances "
        "within tasks"
    )
    return _mean_of([m.marks for m in measured.values()], SEEN_NAME, SEEN_TITLE, rule, parts)


def _most_frequent(group: Sequence[Prediction]) -> float:
    """Per cent right of always giving the answer that is most frequent in this very group: what chance can reach."""
    (_, count), *_ = Counter(normalise_answer(p.target) for p in group).most_common(1)
    return 100 * count / len(group)


def score_predictions(predictions: Sequence[Prediction], about: Mapping[str, Any]) -> Results:
    """Score each benchmark, then MMAvg and the seen tasks. The order of `predictions` changes nothing."""
    groups: dict[str, dict[str, list[Prediction]]] = {
        "unseen": defaultdict(list),
        "heldout": defaultdict(list),
    }
    for prediction in sorted(predictions, key=lambda p: p.key):
        groups[prediction.split][prediction.benchmark].append(prediction)
    scores, marks = _benchmark_scores(groups["unseen"])
    mean = None
    if all(column in marks for column in AVERAGED):
        rule = f"mean of {', '.join(AVERAGED)}; bootstrap interval over instances within benchmarks"
        mean = _mean_of([marks[column] for column in AVERAGED], MEAN_TITLE.lower(), MEAN_TITLE, rule, {})
    seen = _seen_score(groups["heldout"]) if groups["heldout"] else None
    return Results(about, tuple(scores), mean, seen)


def score(folder: Path) -> Results:
    """Score the predictions in `folder` and write `results.json` beside them.

    Raises UserError when there are none or the evaluation has not finished.
    """
    contents = read_finished(folder)
    header = contents.header
    assert header is not None
    about = {**header.about, "fingerprint": dict(header.fingerprint)}
    judged = judged_scores(folder, contents.predictions)
    results = replace(score_predictions(contents.predictions, about), judged=judged)
    result_files.write_results(results, folder / result_files.FILE_NAME)
    return results
