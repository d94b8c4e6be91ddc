"""`mixlora compare`: runs against the first of them, benchmark by benchmark, on the instances that all answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mixlora_cli.benchmarks.metrics import InstanceScores, LossScores
from mixlora_cli.benchmarks.registry import (
    AVERAGED,
    COLUMNS,
    LOSS_TITLE,
    MEAN_TITLE,
    SEEN_TITLE,
    benchmark_named,
)
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.predictions import find_evaluation
from mixlora_cli.evaluation.results import DIGITS, FILE_NAME, LOSS_CAPTION, Results, Score, read_results
from mixlora_cli.evaluation.scoring import LOSS, Task, read_evaluation, score_evaluation
from mixlora_cli.stats import (
    ABSENT,
    Difference,
    Estimate,
    Floats,
    compare_means,
    compare_right,
    compare_right_over_seeds,
    compare_seeds,
    holm,
    over_seeds,
    why_untested,
)
from mixlora_cli.store import write_json, write_text
from mixlora_cli.tables import Table, markdown, show

FORMAT = "mixlora-comparison/1"
CAPTION = (
    "Difference: second minus first, [95 % interval]. p: two-sided; p (Holm): corrected for the number of benchmarks. "
    "n: instances that all answered; only these are compared. Where some answered more, it says of how many."
)
Shared = Mapping[Task, Sequence[int]]
"""By task the instances that all answered."""


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished evaluation: its results, and the scores of single answers that made them."""

    name: str
    """As the user gave it."""
    results: Results
    tasks: Mapping[Task, InstanceScores]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, or a single one."""

    label: str
    runs: tuple[EvaluatedRun, ...]

    def scores(self, column: str) -> list[Score]:
        """Every run's score in a column; empty unless all have one."""
        found = [run.results.column(column) for run in self.runs]
        return [score for score in found if score] if all(found) else []


@dataclass(frozen=True)
class Line:
    """One column of the result table: both sides and their difference."""

    column: str
    unit: str
    first: Estimate
    second: Estimate
    """Of single runs: the score on the shared instances alone."""
    difference: Difference | None
    """None where `untested` says why."""
    n: int
    """Instances that all answered."""
    answered: tuple[int, int]
    """How many each side answered; of single runs they may be more than `n`."""
    untested: str = ""
    runs: tuple[int, int] = (1, 1)
    """Trainings on each side."""
    p_holm: float | None = None
    """p corrected for the number of lines; means over other lines are left alone."""


@dataclass(frozen=True)
class Comparison:
    """One group against the first."""

    first: Group
    second: Group
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """What is compared."""
        return f"first: {self.first.label}; second: {self.second.label}"


def read_run(folder: str) -> EvaluatedRun:
    """The evaluation in a folder or in the run folder around it; scored anew where `results.json` is missing.

    Raises UserError when there is none or it has not finished.
    """
    place = find_evaluation(folder)
    found = read_evaluation(place)
    results = read_results(place) if (place / FILE_NAME).is_file() else score_evaluation(found)
    return EvaluatedRun(folder, results, found.tasks)


def read_group(argument: str) -> Group:
    """Runs of one model: folders separated by commas. Raises UserError when one has no finished evaluation."""
    names = [name for name in argument.split(",") if name]
    if not names:
        raise UserError("compare: expected the folders of two or more evaluated runs")
    runs = tuple(map(read_run, names))
    label = runs[0].results.label
    return Group(label if len(runs) == 1 else f"{label} ({len(runs)} seeds)", runs)


def compare(groups: Sequence[Group]) -> list[Comparison]:
    """Each group against the first. Raises UserError when two share no benchmark, or differ in their data."""
    if len(groups) < 2:
        raise UserError(
            "compare: expected two or more runs; seeds of one model are joined by commas: a,b c,d"
        )
    labels = [group.label for group in groups]
    named = [
        group
        if labels.count(group.label) == 1
        else replace(group, label=f"{group.label} [{group.runs[0].name}]")
        for group in groups
    ]
    return [_compare_two(named[0], other) for other in named[1:]]


def _compare_two(first: Group, second: Group) -> Comparison:
    columns = _shared_columns(first, second)
    if not columns:
        raise UserError(f"{first.label} and {second.label} have no benchmark in common")
    lines = [_line(first, second, column) for column in columns]
    tested = [line.difference.p for line in lines if line.difference and line.column != MEAN_TITLE]
    corrected = iter(holm(tested))
    return Comparison(
        first,
        second,
        tuple(
            replace(line, p_holm=next(corrected)) if line.difference and line.column != MEAN_TITLE else line
            for line in lines
        ),
    )


def _shared_columns(first: Group, second: Group) -> list[str]:
    own = [score.column for score in first.runs[0].results.scores if score.column not in COLUMNS]
    columns = [*COLUMNS, MEAN_TITLE, *own, SEEN_TITLE, LOSS_TITLE]
    return [column for column in columns if first.scores(column) and second.scores(column)]


def _line(first: Group, second: Group, column: str) -> Line:
    unit = first.scores(column)[0].unit
    one, *others = *first.runs, *second.runs
    for other in others:
        _require_tasks(one, other, column)
    tasks = _tasks(one, column)
    if len(others) == 1:
        return _paired(one, others[0], column, unit)
    for other in others:
        _require_tasks(other, one, column)
        _require_same(one, other, tasks)
    ours, theirs = ([score.value for score in group.scores(column)] for group in (first, second))
    sides = over_seeds(ours), over_seeds(theirs)
    count = _num_answered(one, tasks)
    indices = {task: list(one.tasks[task].by_index) for task in tasks}
    why = _incomparable([one, *others], indices) or why_untested(ours, theirs)
    runs = len(ours), len(theirs)
    difference = None if why else compare_seeds(ours, theirs)
    return Line(column, unit, *sides, difference, count, (count, count), why, runs)


def _paired(first: EvaluatedRun, second: EvaluatedRun, column: str, unit: str) -> Line:
    """Both sides and their difference on the instances that both answered."""
    both = _shared([first, second], _tasks(first, column))
    ((task, indices), *_), aggregate = both.items(), _aggregate(first, both)
    ours, theirs = (
        Estimate(aggregate.scale * fmean(run.tasks[task].value(indices) for task, indices in both.items()))
        for run in (first, second)
    )
    difference, why = None, _incomparable([first, second], both, over_instances=True)
    if why:
        pass
    elif _is_right_or_wrong(aggregate, both, column):
        difference = compare_right(*(run.tasks[task].array(indices) for run in (first, second)))
    else:
        difference = compare_means(_by_unit(first, second, both), aggregate.scale, aggregate.is_sum)
    answered = _num_answered(first, list(both)), _num_answered(second, list(both))
    return Line(column, unit, ours, theirs, difference, sum(map(len, both.values())), answered, why)


def paired_over_seeds(first: Group, second: Group) -> dict[str, Difference]:
    """Column by column, the k-th run of `second` minus the k-th of `first`, on the instances that all of them answered.

    With one run each what `compare` gives. With several an instance's difference is its mean over the pairs: test and
    interval are about other instances, for these very trainings.

    Raises UserError when two answered other data, or none shares an instance with all others.
    """
    if len(first.runs) == len(second.runs) == 1:
        (comparison,) = compare([first, second])
        return {line.column: line.difference for line in comparison.lines if line.difference is not None}
    return {column: _over_pairs(first, second, column) for column in _shared_columns(first, second)}


def _over_pairs(first: Group, second: Group, column: str) -> Difference:
    one, *others = *first.runs, *second.runs
    for other in others:
        _require_tasks(one, other, column)
    both = _shared([one, *others], _tasks(one, column))
    by_pair = [_by_unit(*runs, both) for runs in zip(first.runs, second.runs, strict=True)]
    aggregate = _aggregate(one, both)
    if _is_right_or_wrong(aggregate, both, column):
        return compare_right_over_seeds([units[0] for units in by_pair])
    means = [np.mean(units, axis=0) for units in zip(*by_pair, strict=True)]
    return compare_means(means, aggregate.scale, aggregate.is_sum)


def _by_unit(first: EvaluatedRun, second: EvaluatedRun, both: Shared) -> list[Floats]:
    """Second minus first, by task: of each unit that a bootstrap draws."""
    return [
        each
        for task, indices in both.items()
        for each in second.tasks[task].minus(first.tasks[task], indices)
    ]


def _incomparable(runs: Sequence[EvaluatedRun], both: Shared, over_instances: bool = False) -> str:
    """Why losses on these instances have no test; "" where they have, and for other scores."""
    for task, indices in both.items():
        scores = [found for run in runs if isinstance(found := run.tasks[task], LossScores)]
        if len({tuple(each.pairs(indices)[:, 1]) for each in scores}) > 1:
            return "the same answers have other tokens in each"
        if over_instances and scores and len(indices) < 2:
            return f"a single instance of {task[1]}"
    return ""


def _aggregate(run: EvaluatedRun, tasks: Shared) -> InstanceScores:
    return run.tasks[next(iter(tasks))]


def _is_right_or_wrong(aggregate: InstanceScores, tasks: Shared, column: str) -> bool:
    """Whether a column is the share of right answers to one benchmark, for which there are exact tests."""
    return len(tasks) == 1 and aggregate.right_or_wrong and column != SEEN_TITLE


def _tasks(run: EvaluatedRun, column: str) -> list[Task]:
    """Those that make a column."""
    if column in (SEEN_TITLE, LOSS_TITLE):
        split = LOSS if column == LOSS_TITLE else "heldout"
        return sorted(task for task in run.tasks if task[0] == split)
    declared = run.results.about.get("benchmarks")
    unseen = [task for task in run.tasks if task[0] == "unseen"]
    by_column = {benchmark_named(name, declared).column: (split, name) for split, name in unseen}
    return [by_column[each] for each in (AVERAGED if column == MEAN_TITLE else (column,))]


def _num_answered(run: EvaluatedRun, tasks: Sequence[Task]) -> int:
    return sum(len(run.tasks[task].by_index) for task in tasks)


def _require_tasks(first: EvaluatedRun, second: EvaluatedRun, column: str) -> None:
    """Raise UserError unless the second run answered all tasks that make the column of the first."""
    theirs = _tasks(second, column)
    if lacking := [task[1] for task in _tasks(first, column) if task not in theirs]:
        raise UserError(
            f"{column}: {second.name} was not evaluated on {', '.join(lacking)}, which {first.name} was"
        )


def _require_same(first: EvaluatedRun, second: EvaluatedRun, tasks: Sequence[Task]) -> None:
    """Raise UserError unless both answered the same instances: means of different ones differ without any model being
    better.
    """
    for task in tasks:
        ours, theirs = first.tasks[task], second.tasks[task]
        counts = len(ours.by_index), len(theirs.by_index)
        if len(shared_by_all([ours, theirs], task[1])) < max(counts):
            raise UserError(
                f"{task[1]}: {first.name} and {second.name} did not answer the same instances "
                f"({counts[0]} and {counts[1]}); runs are averaged over seeds only on the "
                "same: evaluate all with one eval.limit and one seed"
            )


def _shared(runs: Sequence[EvaluatedRun], tasks: Sequence[Task]) -> dict[Task, list[int]]:
    return {task: shared_by_all([run.tasks[task] for run in runs], task[1]) for task in tasks}


def shared_by_all(scores: Sequence[InstanceScores], where: str) -> list[int]:
    """Indices of the instances that all answered.

    Raises UserError when there are none, or when an index stands for different questions: other data.
    """
    first, *others = scores
    common = set(first.by_index)
    for other in others:
        both = sorted(first.by_index.keys() & other.by_index.keys())
        if not both:
            raise UserError(
                f"{where}: the two evaluations have no instance in common; use the same eval.limit and seed"
            )
        for index in both:
            ours, theirs = first.predictions[index], other.predictions[index]
            if any(getattr(ours, name) != getattr(theirs, name) for name in _ASKED):
                raise UserError(
                    f"{where}: instance {index} is another question in each; evaluate both on the same data"
                )
        common &= set(both)
    if not common:
        raise UserError(f"{where}: no instance was answered by all of {len(scores)} evaluations")
    return sorted(common)


_ASKED = ("question", "target", "category", "image_id")


def comparison_table(comparison: Comparison) -> Table:
    """One comparison; without its caption, which is the same for all."""
    headings = ("", "first", "second", "difference", "p", "p (Holm)", "test", "n")
    return Table(comparison.title, headings, tuple(map(_cells, comparison.lines)))


def _cells(line: Line) -> tuple[str, ...]:
    digits = DIGITS[line.unit]
    sides = []
    for side, runs in zip((line.first, line.second), line.runs, strict=True):
        # An interval that several runs lack: all have the same value.
        between = f" {side.interval_text(digits)}" if runs > 1 else ""
        sides.append(f"{side.value:.{digits}f}{between}" if side.low is None else side.text(digits))

    def signed(value: float) -> str:
        return f"{'+' if value > 0 else ''}{value:.{digits}f}"

    def p_text(value: float | None) -> str:
        return ABSENT if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"

    first, second = line.answered
    count = str(line.n)  # `30`, or `30 of 40` where each side answered 40, or `30 of 40 and 35`
    if not line.n == first == second:
        count += f" of {first}" if first == second else f" of {first} and {second}"
    found = line.difference
    if found is None:
        value = signed((line.second.value or 0.0) - (line.first.value or 0.0))
        return (line.column, *sides, value, ABSENT, ABSENT, line.untested, count)
    interval = Estimate(found.value, found.low, found.high).interval_text(digits)
    difference = f"{signed(found.value)} {interval}"
    return (line.column, *sides, difference, p_text(found.p), p_text(line.p_holm), found.test, count)


def _caption(comparisons: Sequence[Comparison]) -> str:
    has_losses = any(line.column == LOSS_TITLE for each in comparisons for line in each.lines)
    return CAPTION + (LOSS_CAPTION if has_losses else "")


def print_comparisons(comparisons: Sequence[Comparison]) -> None:
    """A table for each pair."""
    show([replace(comparison_table(each), notes=(_caption([each]),)) for each in comparisons])


def comparisons_markdown(comparisons: Sequence[Comparison]) -> str:
    """All of them, the caption below."""
    tables = (replace(comparison_table(each), title="") for each in comparisons)
    parts = [f"{each.title}\n\n{markdown(table)}" for each, table in zip(comparisons, tables, strict=True)]
    return "\n".join([*parts, f"{_caption(comparisons)}\n"])


def as_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """{"format", "comparisons": [{"first", "second", "lines"}]}: `Line`'s fields, intervals as [low, high]."""

    def group(each: Group) -> dict[str, Any]:
        return {"label": each.label, "runs": [run.name for run in each.runs]}

    return {
        "format": FORMAT,
        "comparisons": [
            {
                "first": group(each.first),
                "second": group(each.second),
                "lines": list(map(_line_json, each.lines)),
            }
            for each in comparisons
        ],
    }


def _line_json(line: Line) -> dict[str, Any]:
    def interval(found: Estimate | Difference) -> list[float | None] | None:
        return None if found.low is None else [found.low, found.high]

    def side(found: Estimate, runs: int) -> dict[str, Any]:
        return {"value": found.value, "interval": interval(found), "runs": runs}

    found = line.difference
    return {
        "column": line.column,
        "unit": line.unit,
        "n": line.n,
        "answered": list(line.answered),
        "first": side(line.first, line.runs[0]),
        "second": side(line.second, line.runs[1]),
        "difference": found
        and {
            "value": found.value,
            "interval": interval(found),
            "p": found.p,
            "p_holm": line.p_holm,
            "test": found.test,
        },
        "untested": line.untested or None,
    }


def write_comparisons(comparisons: Sequence[Comparison], folder: Path) -> None:
    """Write compare.json and compare.md into `folder`."""
    write_json(folder / "compare.json", as_json(comparisons))
    write_text(folder / "compare.md", comparisons_markdown(comparisons))
