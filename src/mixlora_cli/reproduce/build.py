"""From cells to a table: values of every row, differences of its pairs, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixlora_cli.benchmarks.metrics import InstanceScores
from mixlora_cli.benchmarks.registry import seen_title
from mixlora_cli.config import TableConfig, TrainConfig
from mixlora_cli.evaluation.results import read_results
from mixlora_cli.reproduce.collect import Cells, find_cells, seen_marks
from mixlora_cli.reproduce.compose import sweep_of
from mixlora_cli.reproduce.layout import AVERAGE_TITLE, LAYOUTS, Layout, Row
from mixlora_cli.reproduce.values import Value, of_marks, of_results, over_runs


@dataclass(frozen=True)
class RowValues:
    """One row: by seed and by column, and over the seeds."""

    row: Row
    by_seed: Mapping[int, Mapping[str, Value]]
    values: Mapping[str, Value]
    evaluations: Mapping[int, Path]
    """Folder of each seed's evaluation on the unseen benchmarks."""
    marks: Mapping[int, Mapping[str, InstanceScores]]
    """By seed and task, for tables about seen tasks."""

    @property
    def seeds(self) -> list[int]:
        """Seeds that have any value."""
        return sorted(seed for seed, values in self.by_seed.items() if values)


@dataclass(frozen=True)
class TableValues:
    """A table with its numbers."""

    layout: Layout
    columns: tuple[str, ...]
    rows: tuple[RowValues, ...]
    notes: tuple[str, ...]
    """What a reader has to know: settings, missing cells, configurations that differ."""
    titles: Mapping[str, str]
    """Column of each seen task; empty for tables about unseen benchmarks."""

    def row(self, experiment: str) -> RowValues:
        """The row of this experiment."""
        return next(each for each in self.rows if each.row.experiment == experiment)


def build_table(config: TableConfig) -> TableValues:
    """Read the cells of a table.

    Raises:
        UserError: the folder has no cells, or a stored result cannot be read.
    """
    layout = LAYOUTS[str(config.what)]
    cells = find_cells(Path(config.runs).expanduser())
    titles = _seen_titles(config.scale) if layout.on_seen_tasks else {}
    columns = layout.columns or (*titles.values(), AVERAGE_TITLE)
    rows = tuple(_read_row(row, cells, columns, titles, config.judge) for row in layout.rows)
    return TableValues(layout, columns, rows, tuple(_notes(rows, cells, columns)), titles)


def _seen_titles(scale: str) -> dict[str, str]:
    """Column of each of the six seen tasks, which the specialists' experiment names."""
    tasks = sweep_of("train", TrainConfig, [f"experiment={scale}/specialist_lora_r4"], "data.tasks")
    return {task: seen_title(task) for task in (value.strip("[]") for value in tasks)}


def _read_row(
    row: Row, cells: Cells, columns: Sequence[str], titles: Mapping[str, str], judge: str | None
) -> RowValues:
    by_seed: dict[int, dict[str, Value]] = {}
    evaluations: dict[int, Path] = {}
    marks: dict[int, dict[str, InstanceScores]] = {}
    for seed in cells.seeds(row.experiment):
        if titles:
            marks[seed] = seen_marks(cells, row.experiment, seed, list(titles), row.per_task)
            by_seed[seed] = of_marks(marks[seed], titles)
        elif place := cells.newest[row.experiment, seed, None].evaluation(seen=False):
            evaluations[seed] = place
            by_seed[seed] = of_results(read_results(place), columns, judge)
    values = {}
    for column in columns:
        found = over_runs([seeds[column] for seeds in by_seed.values() if column in seeds])
        if found is not None:
            values[column] = found
    return RowValues(row, by_seed, values, evaluations, marks)


def _notes(rows: Sequence[RowValues], cells: Cells, columns: Sequence[str]) -> list[str]:
    notes = _settings(rows, cells)
    wanted = {each.row.experiment for each in rows}
    if empty := [each.row.title for each in rows if not each.values]:
        notes.append(f"Missing, shown as -: {', '.join(empty)}.")
    for each in rows:
        if each.values and (lacking := [column for column in columns if column not in each.values]):
            notes.append(f"{each.row.title} lacks {', '.join(lacking)}.")
    if older := sorted({name for name, _, _ in cells.older if name in wanted}):
        notes.append(f"Cells of earlier configurations passed over: {', '.join(older)}.")
    return notes


def _settings(rows: Sequence[RowValues], cells: Cells) -> list[str]:
    """How the rows were trained, in one sentence where they agree."""
    by_setting: dict[str, list[str]] = {}
    for each in rows:
        for (name, seed, _), cell in cells.newest.items():
            about = cell.record.get("about")
            if name != each.row.experiment or not about or seed not in each.seeds:
                continue
            length = f"{about['steps']} steps" if about["steps"] else f"{about['epochs']:g} epochs"
            text = f"{length} of {about['batch']} instances, learning rate {about['learning_rate']:g}"
            titles = by_setting.setdefault(text, [])
            if each.row.title not in titles:
                titles.append(each.row.title)
    if len(by_setting) == 1:
        return [f"Trainings: {next(iter(by_setting))}."]
    return [f"Trainings of {', '.join(titles)}: {text}." for text, titles in by_setting.items()]
