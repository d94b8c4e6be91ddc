"""The numbers of a row: mean and t interval over seeds, or one training's value with its interval over instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mixlora_cli.benchmarks.metrics import InstanceScores
from mixlora_cli.benchmarks.registry import MEAN_TITLE
from mixlora_cli.evaluation.results import JudgedScore, Results, Score
from mixlora_cli.reproduce.layout import AVERAGE_TITLE
from mixlora_cli.stats import SEED, Floats, bootstrap_means, over_seeds, percentile, wilson


@dataclass(frozen=True)
class Value:
    """One cell of a table."""

    value: float
    low: float | None
    high: float | None
    """Ends of the 95 % interval; None of several trainings that all have the same value."""
    runs: int = 1
    """Trainings behind it: with several, the interval is one over seeds."""


def over_runs(values: Sequence[Value]) -> Value | None:
    """One value of several trainings; None of none."""
    if len(values) < 2:
        return values[0] if values else None
    mean = over_seeds([each.value for each in values])
    assert mean.value is not None
    return Value(mean.value, mean.low, mean.high, len(values))


def of_results(results: Results, columns: Sequence[str], judge: str | None) -> dict[str, Value]:
    """A training's value in each column that it was scored in; by a judge where one is named, MME by its rule."""
    scores = {column: _score(results, column, judge) for column in columns}
    return {column: Value(score.value, score.low, score.high) for column, score in scores.items() if score}


def _score(results: Results, column: str, judge: str | None) -> Score | JudgedScore | None:
    if judge is None or column == "MME":
        return results.mean if column == MEAN_TITLE else results.column(column)
    judged = next((each for each in results.judged if each.title == judge), None)
    if judged is None or column == MEAN_TITLE:
        return None if judged is None else judged.mean
    return next((score for score in judged.scores if score.column == column), None)


def of_marks(marks: Mapping[str, InstanceScores], titles: Mapping[str, str]) -> dict[str, Value]:
    """Per cent right on each seen task, and the average where all are there.

    Args:
        marks: By task.
        titles: Column of each task of the table.
    """
    values: dict[str, Value] = {}
    arrays: list[Floats] = []
    for task in [task for task in titles if task in marks]:
        right = np.array(list(marks[task].by_index.values()), dtype=np.float64)
        interval = wilson(int(right.sum()), len(right)).scaled(100)
        values[titles[task]] = Value(100 * float(right.mean()), interval.low, interval.high)
        arrays.append(right)
    if len(arrays) == len(titles):
        rng = np.random.default_rng(SEED)
        samples = np.mean([100 * bootstrap_means(each[:, None], rng)[:, 0] for each in arrays], axis=0)
        mean = float(np.mean([value.value for value in values.values()]))
        interval = percentile(mean, samples)
        values[AVERAGE_TITLE] = Value(mean, interval.low, interval.high)
    return values
