"""`mixlora compare`: runs against the first of them, benchmark by benchmark, on the instances that all answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.benchmarks import AVERAGED, COLUMNS, MEAN_TITLE, benchmark_named
from mixlora_cli.evaluation.marks import (
    Run,
    Task,
    mme_differences,
    mme_value,
    pairs,
    read_run,
    require_same,
    shared,
    shared_by_all,
)
from mixlora_cli.evaluation.metrics import Metric
from mixlora_cli.evaluation.results import Score
from mixlora_cli.evaluation.scoring import SEEN_TITLE
from mixlora_cli.stats import (
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


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, or a single one."""

    label: str
    runs: tuple[Run, ...]

    def scores(self, column: str) -> list[Score]:
        """Every run's score in a column; empty unless all have one."""
        found = [_score(run, column) for run in self.runs]
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
    labels = distinct([group.label for group in groups], [group.runs[0].name for group in groups])
    named = [Group(label, group.runs) for label, group in zip(labels, groups, strict=True)]
    return [_compare_two(named[0], other) for other in named[1:]]


def distinct(labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Labels; those that occur more than once with what tells them apart."""
    return [
        label if labels.count(label) == 1 else f"{label} [{name}]"
        for label, name in zip(labels, names, strict=True)
    ]


def _compare_two(first: Group, second: Group) -> Comparison:
    columns = [column for column in _columns(first) if first.scores(column) and second.scores(column)]
    if not columns:
        raise UserError(f"{first.label} and {second.label} have no benchmark in common")
    lines = [_line(first, second, column) for column in columns]
    tested = [place for place, line in enumerate(lines) if line.difference and line.column != MEAN_TITLE]
    differences = [line.difference for line in lines]
    corrected = holm([found.p for place in tested if (found := differences[place])])
    for place, p in zip(tested, corrected, strict=True):
        lines[place] = replace(lines[place], p_holm=p)
    return Comparison(first, second, tuple(lines))


def _columns(group: Group) -> list[str]:
    own = [score.column for score in group.runs[0].results.scores if score.column not in COLUMNS]
    return [*COLUMNS, MEAN_TITLE, *own, SEEN_TITLE]


def _score(run: Run, column: str) -> Score | None:
    if column == MEAN_TITLE:
        return run.results.mean
    return run.results.seen if column == SEEN_TITLE else run.results.column(column)


def _line(first: Group, second: Group, column: str) -> Line:
    unit = first.scores(column)[0].unit
    one, *others = *first.runs, *second.runs
    tasks = _tasks(one, column)
    for other in others:
        _require_tasks(one, other, column)
    if len(others) == 1:
        return _paired(one, others[0], column, unit, tasks)
    for other in others:
        _require_tasks(other, one, column)
    require_same((one, *others), tasks)
    ours, theirs = ([score.value for score in group.scores(column)] for group in (first, second))
    count = _answered(one, column)
    difference, why = compare_seeds(ours, theirs), why_untested(ours, theirs)
    return Line(
        column,
        unit,
        over_seeds(ours),
        over_seeds(theirs),
        difference,
        count,
        (count, count),
        why,
        (len(ours), len(theirs)),
    )


def _require_tasks(first: Run, second: Run, column: str) -> None:
    """Raise UserError unless the second run answered all tasks that make the column of the first."""
    theirs = _tasks(second, column)
    if lacking := [task[1] for task in _tasks(first, column) if task not in theirs]:
        raise UserError(
            f"{column}: {second.name} was not evaluated on {', '.join(lacking)}, which {first.name} was"
        )


def _answered(run: Run, column: str) -> int:
    return sum(len(run.tasks[task].by_index) for task in _tasks(run, column))


def _paired(first: Run, second: Run, column: str, unit: str, tasks: Sequence[Task]) -> Line:
    """Both sides and their difference on the instances that both answered."""
    both = {task: shared(first.tasks[task], second.tasks[task], task[1]) for task in tasks}
    ours, theirs = (over_seeds([_value_on(run, both)]) for run in (first, second))
    answered = _answered(first, column), _answered(second, column)
    count = sum(map(len, both.values()))
    difference = _difference(first, second, column, both)
    return Line(column, unit, ours, theirs, difference, count, answered)


def _value_on(run: Run, chosen: Mapping[Task, Sequence[int]]) -> float:
    """A column's score on chosen instances: MME's sum, else 100 times the mean over tasks of their mean mark."""
    means = []
    for task, indices in chosen.items():
        marks = run.tasks[task]
        if marks.metric.mark is None:
            return mme_value(marks, indices)
        means.append(fmean(marks.by_index[index] for index in indices))
    return 100 * fmean(means)


def _difference(first: Run, second: Run, column: str, both: Mapping[Task, Sequence[int]]) -> Difference:
    task, indices = next(iter(both.items()))
    ours, theirs = first.tasks[task], second.tasks[task]
    if _is_right_or_wrong(ours.metric, len(both), column):
        return compare_right(*pairs(ours, theirs, indices))
    differences = _by_unit(first, second, both)
    return compare_means(differences, 100, total=ours.metric.mark is None)


def _is_right_or_wrong(metric: Metric, num_tasks: int, column: str) -> bool:
    """Whether a column is the share of right answers to one benchmark, for which there are exact tests."""
    return num_tasks == 1 and metric.mark is not None and not metric.graded and column != SEEN_TITLE


def _by_unit(first: Run, second: Run, both: Mapping[Task, Sequence[int]]) -> list[Floats]:
    """Second minus first: for MME each image's points, by subtask; else each instance's mark, by task."""
    found: list[Floats] = []
    for task, indices in both.items():
        ours, theirs = first.tasks[task], second.tasks[task]
        if ours.metric.mark is None:
            found += mme_differences(ours, theirs, indices)
        else:
            before, after = pairs(ours, theirs, indices)
            found.append(after - before)
    return found


def paired_over_seeds(first: Group, second: Group) -> dict[str, Difference]:
    """Column by column, the k-th run of `second` minus the k-th of `first`, on the instances that all of them answered.

    With one run each what `compare` gives. With several an instance's difference is its mean over the pairs: test and
    interval are about other instances, for these very trainings.

    Raises UserError when two answered other data, or none shares an instance with all others.
    """
    if len(first.runs) == len(second.runs) == 1:
        (comparison,) = compare([first, second])
        return {line.column: line.difference for line in comparison.lines if line.difference is not None}
    columns = [column for column in _columns(first) if first.scores(column) and second.scores(column)]
    return {column: _over_pairs(first, second, column) for column in columns}


def _over_pairs(first: Group, second: Group, column: str) -> Difference:
    one, *others = *first.runs, *second.runs
    tasks = _tasks(one, column)
    for other in others:
        _require_tasks(one, other, column)
    all_runs = (one, *others)
    both = {task: shared_by_all([run.tasks[task] for run in all_runs], task[1]) for task in tasks}
    by_pair = [_by_unit(*runs, both) for runs in zip(first.runs, second.runs, strict=True)]
    metric = one.tasks[tasks[0]].metric
    if _is_right_or_wrong(metric, len(tasks), column):
        return compare_right_over_seeds([units[0] for units in by_pair])
    means = [np.mean(units, axis=0) for units in zip(*by_pair, strict=True)]
    return compare_means(means, 100, total=metric.mark is None)


def _tasks(run: Run, column: str) -> list[Task]:
    """Those that make a column."""
    if column == SEEN_TITLE:
        return sorted(task for task in run.tasks if task[0] == "heldout")
    declared = run.results.about.get("benchmarks")
    wanted = AVERAGED if column == MEAN_TITLE else (column,)
    by_column = {
        benchmark_named(name, declared).column: (split, name)
        for split, name in run.tasks
        if split == "unseen"
    }
    return [by_column[each] for each in wanted]
