"""`mixlora compare`: runs against the first of them, benchmark by benchmark, on the instances that both answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.benchmarks import AVERAGED, COLUMNS, MEAN_TITLE, benchmark_named
from mixlora_cli.evaluation.marks import Run, Task, mme_differences, pairs, read_run, shared
from mixlora_cli.evaluation.paired import (
    Difference,
    OverSeeds,
    compare_means,
    compare_right,
    compare_seeds,
    holm,
    over_seeds,
)
from mixlora_cli.evaluation.results import Score
from mixlora_cli.evaluation.scoring import SEEN_TITLE
from mixlora_cli.evaluation.statistics import Floats


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
    first: OverSeeds
    second: OverSeeds
    difference: Difference | None
    """None where one side has several seeds and the other a single run."""
    n: int
    """Instances that both answered."""
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
        line = lines[place]
        lines[place] = Line(line.column, line.unit, line.first, line.second, line.difference, line.n, p)
    return Comparison(first, second, tuple(lines))


def _columns(group: Group) -> list[str]:
    own = [score.column for score in group.runs[0].results.scores if score.column not in COLUMNS]
    return [*COLUMNS, MEAN_TITLE, *own, SEEN_TITLE]


def _score(run: Run, column: str) -> Score | None:
    if column == MEAN_TITLE:
        return run.results.mean
    return run.results.seen if column == SEEN_TITLE else run.results.column(column)


def _line(first: Group, second: Group, column: str) -> Line:
    ours, theirs = first.scores(column), second.scores(column)
    sides = over_seeds([score.value for score in ours]), over_seeds([score.value for score in theirs])
    if len(first.runs) == len(second.runs) == 1:
        difference, count = _paired(first.runs[0], second.runs[0], column)
        return Line(column, ours[0].unit, *sides, difference, count)
    values = [score.value for score in ours], [score.value for score in theirs]
    return Line(
        column, ours[0].unit, *sides, compare_seeds(*values), min(score.n for score in (*ours, *theirs))
    )


def _paired(first: Run, second: Run, column: str) -> tuple[Difference, int]:
    """The difference on shared instances and how many these are."""
    tasks = _tasks(first, column)
    if lacking := [name for split, name in tasks if (split, name) not in second.tasks]:
        raise UserError(f"{second.name} was not evaluated on {', '.join(lacking)}, which {first.name} was")
    both = {task: shared(first.tasks[task], second.tasks[task], task[1]) for task in tasks}
    count = sum(map(len, both.values()))
    (task, indices), *others = both.items()
    ours, theirs = first.tasks[task], second.tasks[task]
    if not others and ours.metric.mark is None:
        return compare_means(mme_differences(ours, theirs, indices), 100, total=True), count
    if not others and not ours.metric.graded and column != SEEN_TITLE:
        return compare_right(*pairs(ours, theirs, indices)), count
    differences: list[Floats] = []
    for task, indices in both.items():
        before, after = pairs(first.tasks[task], second.tasks[task], indices)
        differences.append(after - before)
    return compare_means(differences, 100), count


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
