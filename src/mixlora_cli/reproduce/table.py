"""`mixlora table`: read finished cells, print the table and the differences of its pairs, write them and Figure 4."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mixlora_cli.benchmarks.metrics import InstanceScores, LossScores, mean_loss, mean_over
from mixlora_cli.benchmarks.registry import LOSS_TITLE, MEAN_TITLE, seen_title
from mixlora_cli.config import TableConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.compare import Group, paired_over_seeds, read_run, shared_by_all
from mixlora_cli.evaluation.results import (
    DIGITS,
    FILE_NAME,
    LOSS_CAPTION,
    JudgedScore,
    Results,
    Score,
    read_results,
)
from mixlora_cli.evaluation.scoring import LOSS, Task
from mixlora_cli.plots import figure
from mixlora_cli.progress import say
from mixlora_cli.reproduce.curves import draw_curves
from mixlora_cli.reproduce.jobs import EVALUATION, RECORD, SEEN_EVALUATION, read_record
from mixlora_cli.reproduce.paper import (
    ABSENT,
    AVERAGE_TITLE,
    SEEN_TASKS,
    TABLES,
    Layout,
    Pair,
    Row,
    columns_of,
    published,
    rows_of,
)
from mixlora_cli.stats import (
    Difference,
    Estimate,
    Floats,
    compare_means,
    compare_right_over_seeds,
    compare_same_seeds,
    compare_seeds,
    holm,
    over_seeds,
    why_untested,
)
from mixlora_cli.tables import Cell, Table, latex, markdown, show, to_csv
from mixlora_cli.training.run_folder import RunFolder

UNITS = "MME in points, the rest in per cent; [...]: 95 % interval"
SIGNIFICANCE = 0.05
_TESTS = (
    "Paired: on the same instances, the mean over the seeds; McNemar's exact test for right or wrong, over "
    "several seeds an exact test by flipping signs; a paired bootstrap for MME, Text-VQA, means. About other "
    "instances, for these trainings. Over seeds: Welch's t; seed by seed: Student's paired t, for trainings that share "
    "their order of instances; both about other trainings, on these instances. p is not corrected; *: below 0.05 "
    "after Holm's correction over the benchmarks of a line."
)
_WITH, _WITHOUT = "#1f5a94", "#d99a3c"  # told apart in grey, too
_BAR = 0.36

Columns = Mapping[str, Estimate]
"""Numbers by column."""
Seeds = tuple[tuple[int, int], ...]
"""(seed of the left row, seed of the right row) of trainings that are compared with one another."""


def table(config: TableConfig) -> list[Path]:
    """Print one table; the files that were written.

    Raises:
        UserError: the folder has no cells, or two evaluations that are compared have other data.
    """
    values = build_table(config)
    lines = pair_lines(values)
    tables = [_values_table(values)]
    if lines:
        tables.append(_differences_table(values, lines))
    show(tables)
    folder = Path(config.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        f"{values.name}.md": markdown(tables),
        f"{values.name}.tex": latex(tables),
        f"{values.name}.csv": _values_csv(values),
        f"{values.name}-differences.csv": _differences_csv(lines),
    }
    for file, text in contents.items():
        (folder / file).write_text(text, encoding="utf-8")
    written = [folder / file for file in contents]
    if values.name == "figure4":
        written += _draw(values, folder)
    if values.layout.of_every_task:
        beside = values.row(values.layout.pairs[0][1]).row.title
        written += draw_curves(_trainings(values, config), beside, folder)
    say(f"written: {', '.join(map(str, written))}", Console())
    return written


def _trainings(values: TableValues, config: TableConfig) -> dict[str, dict[int, Path]]:
    cells = find_cells(Path(config.runs).expanduser())
    return {
        each.row.title: {seed: RunFolder(cells[each.row.name, seed, None][0][0]).metrics for seed in seeds}
        for each in values.rows
        if (seeds := each.seeds(LOSS_TITLE))
    }


@dataclass(frozen=True)
class RowValues:
    """One row: by seed and by column, and over the seeds."""

    row: Row
    by_seed: Mapping[int, Columns]
    values: Columns
    evaluations: Mapping[int, Path]
    """Folder of each seed's evaluation on the unseen benchmarks."""
    scores: Mapping[int, Mapping[Task, InstanceScores]]
    """By seed and task, for tables about seen tasks: answers, and losses where there are."""

    def seeds(self, column: str | None = None) -> list[int]:
        """Seeds that have a value in the column, or in any."""
        has = (seed for seed, values in self.by_seed.items() if (column in values if column else values))
        return sorted(has)


@dataclass(frozen=True)
class TableValues:
    """A table with its numbers."""

    name: str
    scale: str
    columns: tuple[str, ...]
    rows: tuple[RowValues, ...]
    notes: tuple[str, ...]
    """What a reader has to know: settings, missing cells, configurations that differ."""
    loss_tasks: tuple[str, ...] = ()
    """Seen tasks that the losses are the mean over."""

    @property
    def layout(self) -> Layout:
        """Its title, headings and pairs."""
        return TABLES[self.name]

    def row(self, name: str) -> RowValues:
        """The row of this experiment."""
        return next(each for each in self.rows if each.row.name == name)


Key = tuple[str, int, str | None]
"""Experiment, seed, task."""


Cells = Mapping[Key, list[tuple[Path, Mapping[str, Any]]]]
"""Folders and what their `cell.json` says; of several configurations of one cell the one asked for last comes first."""


def find_cells(folder: Path) -> Cells:
    """The cells in `folder`.

    The one that was asked for last counts, even if it has no result: an older one would be another experiment in the
    place of a failed one.

    Raises:
        UserError: there is no cell.
    """
    cells: dict[Key, list[tuple[Path, Mapping[str, Any]]]] = defaultdict(list)
    for path in sorted(folder.glob(f"*/{RECORD}")):
        record = read_record(path.parent)
        if "experiment" in record:
            cells[record["experiment"], record["seed"], record["task"]].append((path.parent, record))
    if not cells:
        raise UserError(
            f"runs={folder}: no cells there; expected the folder that `mixlora reproduce` wrote to"
        )
    for found in cells.values():
        found.sort(key=lambda cell: float(cell[1]["used"]), reverse=True)
    return cells


def _evaluation(cells: Cells, key: Key, folder: str) -> Path | None:
    """A cell's finished evaluation; None where it has not been made."""
    place = cells[key][0][0] / folder if key in cells else None
    return place if place is not None and (place / FILE_NAME).is_file() else None


def build_table(config: TableConfig) -> TableValues:
    """Read the cells of a table.

    Raises:
        UserError: the folder has no cells, or a stored result cannot be read.
    """
    name = str(config.what)
    columns = columns_of(name, config.scale)
    tasks = SEEN_TASKS[config.scale] if TABLES[name].on_seen_tasks else ()
    found = find_cells(Path(config.runs).expanduser())
    cells, others = _on_one_data(found, rows_of(name), SEEN_EVALUATION if tasks else EVALUATION)
    rows = tuple(_read_row(row, cells, columns, tasks, config.judge_title) for row in rows_of(name))
    if lossy := _loss_tasks(rows, tasks):
        rows = tuple(_with_losses(each, lossy) for each in rows)
        columns = (*columns, LOSS_TITLE)
    notes = _notes(rows, cells, columns)
    if others:
        notes.append(
            f"Left out, evaluated on an earlier version of the data than the others: {', '.join(others)}; "
            "`mixlora reproduce` with the same folder evaluates them anew."
        )
    return TableValues(name, config.scale, columns, rows, tuple(notes), lossy)


def _on_one_data(cells: Cells, rows: Sequence[Row], folder: str) -> tuple[Cells, list[str]]:
    """The cells of these rows without those whose evaluation is of other data than that of the cell asked for last,
    and what the latter are called.
    """
    names = {row.name: row.title for row in rows}
    asked = {key: found[0][1] for key, found in cells.items() if key[0] in names}
    versions = {
        key: version
        for key, record in asked.items()
        if (version := record.get("parts", {}).get(folder, {}).get("asked", {}).get("data version"))
    }
    newest = max(versions, key=lambda key: float(asked[key]["used"]), default=None)
    others = {key for key, version in versions.items() if newest and version != versions[newest]}
    titles = [
        f"{names[name]} seed {seed}" + (f" {task}" if task else "")
        for name, seed, task in sorted(others, key=str)
    ]
    return {key: found for key, found in cells.items() if key not in others}, titles


def _read_row(
    row: Row, cells: Cells, columns: Sequence[str], tasks: Sequence[str], judge: str | None
) -> RowValues:
    by_seed: dict[int, Columns] = {}
    evaluations: dict[int, Path] = {}
    scores: dict[int, Mapping[Task, InstanceScores]] = {}
    for seed in sorted({seed for name, seed, _ in cells if name == row.name}):
        if tasks:
            scores[seed] = _seen_scores(cells, row, seed, tasks)
            by_seed[seed] = _of_scores(scores[seed], tasks)
        elif place := _evaluation(cells, (row.name, seed, None), EVALUATION):
            evaluations[seed] = place
            results = read_results(place)
            by_seed[seed] = {
                column: Estimate(score.value, score.low, score.high)
                for column in columns
                if (score := _score(results, column, judge))
            }
    return RowValues(row, by_seed, _over_seeds(by_seed, columns), evaluations, scores)


def _over_seeds(by_seed: Mapping[int, Columns], columns: Sequence[str]) -> Columns:
    return {
        column: found[0] if len(found) == 1 else over_seeds([_number(each) for each in found])
        for column in columns
        if (found := [seeds[column] for seeds in by_seed.values() if column in seeds])
    }


def _loss_tasks(rows: Sequence[RowValues], tasks: Sequence[str]) -> tuple[str, ...]:
    """Seen tasks, at least the table's own `tasks`, that all trainings with losses of these have losses of."""
    every = [
        {name for split, name in scores if split == LOSS} for row in rows for scores in row.scores.values()
    ]
    whole = [names for names in every if names >= set(tasks)]
    return tuple(sorted(set.intersection(*whole))) if whole else ()


def _losses(scores: Mapping[Task, InstanceScores], tasks: Sequence[str]) -> list[LossScores]:
    return [found for task in tasks if isinstance(found := scores.get((LOSS, task)), LossScores)]


def _with_losses(row: RowValues, tasks: Sequence[str]) -> RowValues:
    """The row with the mean loss over these tasks where a training has them all."""
    by_seed = {
        seed: {**values, LOSS_TITLE: mean_loss(losses)}
        if len(losses := _losses(row.scores[seed], tasks)) == len(tasks)
        else values
        for seed, values in row.by_seed.items()
    }
    return replace(row, by_seed=by_seed, values={**row.values, **_over_seeds(by_seed, [LOSS_TITLE])})


def _number(estimate: Estimate) -> float:
    assert estimate.value is not None  # only a mean of nothing has none
    return estimate.value


def _score(results: Results, column: str, judge: str | None) -> Score | JudgedScore | None:
    """By a judge where one is named, MME by its rule."""
    if judge is None or column == "MME":
        return results.column(column)
    judged = next((each for each in results.judged if each.title == judge), None)
    if judged is None or column == MEAN_TITLE:
        return None if judged is None else judged.mean
    return next((score for score in judged.scores if score.column == column), None)


def _seen_scores(cells: Cells, row: Row, seed: int, tasks: Sequence[str]) -> dict[Task, InstanceScores]:
    """Of the held-out instances of each task; specialists have a cell for each, the others one for all."""
    scores: dict[Task, InstanceScores] = {}
    for task in tasks if row.per_task else (None,):
        if place := _evaluation(cells, (row.name, seed, task), SEEN_EVALUATION):
            run = read_run(str(place))
            scores |= {
                (split, name): found
                for (split, name), found in run.tasks.items()
                if split == LOSS or (split == "heldout" and name in tasks)
            }
    return scores


def _of_scores(scores: Mapping[Task, InstanceScores], tasks: Sequence[str]) -> Columns:
    """Per cent right on each seen task, and the average where all are there."""
    arrays = {task: scores["heldout", task].array() for task in tasks if ("heldout", task) in scores}
    # The values as they always were, to the last digit: 100 * mean, and the mean of these.
    per_cent = {task: 100 * float(array.mean()) for task, array in arrays.items()}
    values = {
        seen_title(task): replace(scores["heldout", task].compute().score, value=value)
        for task, value in per_cent.items()
    }
    if len(arrays) == len(tasks):
        mean = float(np.mean(list(per_cent.values())))
        values[AVERAGE_TITLE] = replace(mean_over(list(arrays.values())), value=mean)
    return values


def _notes(rows: Sequence[RowValues], cells: Cells, columns: Sequence[str]) -> list[str]:
    notes = _settings(rows, cells)
    if empty := [each.row.title for each in rows if not each.values]:
        notes.append(f"Missing, shown as -: {', '.join(empty)}.")
    for each in rows:
        if each.values and (lacking := [column for column in columns if column not in each.values]):
            notes.append(f"{each.row.title} lacks {', '.join(lacking)}.")
    passed_over = {name for (name, *_), found in cells.items() if len(found) > 1}
    if older := sorted(passed_over & {each.row.name for each in rows}):
        notes.append(f"Cells of earlier configurations passed over: {', '.join(older)}.")
    return notes


def _settings(rows: Sequence[RowValues], cells: Cells) -> list[str]:
    """How the rows were trained, in one sentence where they agree."""
    by_setting: dict[str, list[str]] = {}
    for each in rows:
        for (name, seed, _), ((_, record), *_) in cells.items():
            about = record.get("about")
            if name != each.row.name or not about or seed not in each.seeds():
                continue
            length = f"{about['steps']} steps" if about["steps"] else f"{about['epochs']:g} epochs"
            text = f"{length} of {about['batch']} instances, learning rate {about['learning_rate']:g}"
            titles = by_setting.setdefault(text, [])
            if each.row.title not in titles:
                titles.append(each.row.title)
    if len(by_setting) == 1:
        return [f"Trainings: {next(iter(by_setting))}."]
    return [f"Trainings of {', '.join(titles)}: {text}." for text, titles in by_setting.items()]


@dataclass(frozen=True)
class PairLine:
    """A pair's difference in one column, left minus right."""

    pair: Pair
    column: str
    paired: Difference
    """On the instances that both answered; the mean over `seeds`."""
    seeds: tuple[int, ...]
    """The seeds that both have, else the first of the left row."""
    over_seeds: Difference | None
    """Of the means over seeds; None unless both rows have several, and some spread."""
    seed_by_seed: Difference | None
    """Of the trainings with the same seed; None unless there are several such, and some spread."""
    untested: str
    """Why several seeds of both rows have no test."""
    p_holm: float | None = None
    """Corrected for the number of columns; the means are left alone."""


def pair_lines(table: TableValues) -> list[PairLine]:
    """Every pair of the layout that both rows are there for, column by column."""
    lines: list[PairLine] = []
    for pair in table.layout.pairs:
        left, right = table.row(pair[0]), table.row(pair[1])
        unseen: dict[Seeds, Mapping[str, Difference]] = {}  # evaluations are read once for the same seeds
        fresh = []
        for column in table.columns:
            if not (seeds := _paired_seeds(left, right, column)):
                continue
            if table.layout.on_seen_tasks:
                found: Difference | None = _seen_difference(table, left, right, column, seeds)
            else:
                if seeds not in unseen:
                    unseen[seeds] = _unseen_differences(left, right, seeds)
                found = unseen[seeds].get(column)
            if found is not None:
                before, after = (
                    {seed: _number(row.by_seed[seed][column]) for seed in row.seeds(column)}
                    for row in (right, left)
                )
                every = [*before.values()], [*after.values()]
                same = tuple([side[seed] for seed in before if seed in after] for side in (before, after))
                why = why_untested(*every) if min(map(len, every)) > 1 else ""
                ours = tuple(seed for seed, _ in seeds)
                over = compare_seeds(*every), compare_same_seeds(*same)
                fresh.append(PairLine(pair, column, found, ours, *over, why))
        lines += _corrected(fresh)
    return lines


def _paired_seeds(left: RowValues, right: RowValues, column: str) -> Seeds:
    """The seeds that both have the column of, each with itself; where there is none, each one's first."""
    ours, theirs = left.seeds(column), right.seeds(column)
    both = tuple((seed, seed) for seed in ours if seed in theirs)
    return both or tuple(zip(ours[:1], theirs[:1], strict=False))


def _unseen_differences(left: RowValues, right: RowValues, seeds: Seeds) -> Mapping[str, Difference]:
    theirs = tuple(read_run(str(right.evaluations[seed])) for _, seed in seeds)
    ours = tuple(read_run(str(left.evaluations[seed])) for seed, _ in seeds)
    return paired_over_seeds(*(Group(runs[0].results.label, runs) for runs in (theirs, ours)))


def _seen_difference(
    table: TableValues, left: RowValues, right: RowValues, column: str, seeds: Seeds
) -> Difference:
    def by_seed(task: str, split: str = "heldout") -> list[Floats]:
        """Left minus right for each pair of trainings, on the instances that all of them answered."""
        key = split, task
        both = [(right.scores[theirs][key], left.scores[ours][key]) for ours, theirs in seeds]
        indices = shared_by_all([scores for each in both for scores in each], task)
        return [after.minus(before, indices)[0] for before, after in both]

    tasks = SEEN_TASKS[table.scale]
    if column == AVERAGE_TITLE:
        return compare_means([np.mean(by_seed(task), axis=0) for task in tasks], 100)
    if column == LOSS_TITLE:
        return compare_means(
            [np.mean(by_seed(task, LOSS), axis=0) for task in table.loss_tasks], LossScores.scale
        )
    return compare_right_over_seeds(by_seed(next(task for task in tasks if seen_title(task) == column)))


def _corrected(lines: Sequence[PairLine]) -> list[PairLine]:
    tested = [line for line in lines if line.column not in (MEAN_TITLE, AVERAGE_TITLE, LOSS_TITLE)]
    corrected = iter(holm([line.paired.p for line in tested]))
    return [replace(line, p_holm=next(corrected)) if line in tested else line for line in lines]


def _values_table(table: TableValues) -> Table:
    """The paper's table with our numbers."""
    rows: tuple[tuple[Cell | str, ...], ...] = tuple(
        (*each.row.labels, *(_value_cell(table, each, column) for column in table.columns))
        for each in table.rows
    )
    headings = table.layout.headings
    title = f"{table.layout.title} (scale: {table.scale})"
    return Table(title, (*headings, *table.columns), rows, len(headings), (_reading(table), *table.notes))


def _reading(table: TableValues) -> str:
    over = " over instances"
    if several := [each for each in table.rows if len(each.seeds()) > 1]:
        seeds = "; ".join(f"{each.row.title}: {', '.join(map(str, each.seeds()))}" for each in several)
        over = f" over instances; ±: mean of several seeds and interval over them ({seeds})"
    if any(value.low is None for each in table.rows for value in each.values.values()):
        over += f"; [{ABSENT}]: the same in every seed, no spread to make an interval of"
    beside = "; p: the paper's number" if table.scale == "paper" else ""
    losses = f"{LOSS_CAPTION} The mean over {len(table.loss_tasks)} tasks." if table.loss_tasks else ""
    return f"{UNITS}{over}{beside}.{losses}"


def _value_cell(table: TableValues, each: RowValues, column: str) -> Cell:
    number = published(table.name, each.row.name, column) if table.scale == "paper" else None
    beside = "" if number is None else f"p {number:.2f}"
    value, digits = each.values.get(column), _digits(column)
    if value is None:
        return Cell(ABSENT, "", beside)
    mark = "±" if len(each.seeds(column)) > 1 else ""
    return Cell(f"{value.value:.{digits}f}{mark}", value.interval_text(digits), beside)


def _digits(column: str) -> int:
    return DIGITS[{"MME": "points", LOSS_TITLE: "nats"}.get(column, "%")]


def _differences_table(table: TableValues, lines: Sequence[PairLine]) -> Table:
    """Differences of the layout's pairs; further rows where both sides have several seeds."""
    rows: list[tuple[Cell | str, ...]] = []
    for pair in table.layout.pairs:
        left, right, why = pair
        found = {line.column: line for line in lines if line.pair == pair}
        if not found:
            continue
        seeds = max((line.seeds for line in found.values()), key=len)
        head = f"{table.row(left).row.title} - {table.row(right).row.title}"
        paired = [_paired_cell(found.get(column), column, seeds) for column in table.columns]
        rows.append((head, why, f"{_seeds_text(seeds)}, paired", *paired))
        if any(line.over_seeds or line.untested for line in found.values()):
            over = [_seeds_cell(found.get(column), column) for column in table.columns]
            rows.append((head, why, "means over seeds", *over))
        if same := {column: line.seed_by_seed for column, line in found.items() if line.seed_by_seed}:
            cells = [
                _cell(same[column], column, "") if column in same else Cell(ABSENT)
                for column in table.columns
            ]
            rows.append((head, why, "seed by seed", *cells))
    headings = ("Left - right", "With", "By", *table.columns)
    return Table("Differences", headings, tuple(rows), 3, (_TESTS,))


def _seeds_text(seeds: Sequence[int]) -> str:
    """`seed 0` or `seeds 0, 1, 2`."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _paired_cell(line: PairLine | None, column: str, usual: Sequence[int]) -> Cell:
    """Says of which seeds it is where those are not the row's."""
    if line is None:
        return Cell(ABSENT)
    cell = _cell(line.paired, column, "*" if line.p_holm is not None and line.p_holm < SIGNIFICANCE else "")
    if line.seeds == usual:
        return cell
    return replace(cell, beside=f"{cell.beside} ({_seeds_text(line.seeds)})")


def _seeds_cell(line: PairLine | None, column: str) -> Cell:
    if line is None or line.over_seeds is None:
        return Cell(ABSENT, "", line.untested if line else "")
    return _cell(line.over_seeds, column, "")


def _cell(difference: Difference, column: str, star: str) -> Cell:
    digits = _digits(column)
    p = "p<0.001" if difference.p < 0.001 else f"p={difference.p:.3f}"
    value = round(difference.value, digits) + 0.0  # no "-0.0"
    ends = f"[{difference.low:.{digits}f}, {difference.high:.{digits}f}]"
    return Cell(f"{value:+.{digits}f}{star}", ends, p)


def _values_csv(table: TableValues) -> str:
    """A line for each row and column: value, interval, seeds, the paper's number."""
    headings = map(str.lower, table.layout.headings)
    fields = ("experiment", *headings, "column", "value", "low", "high", "seeds", "paper")
    lines: list[Sequence[object]] = []
    for each in table.rows:
        for column in table.columns:
            value = each.values.get(column, Estimate(None))
            seeds = " ".join(map(str, each.seeds(column)))
            paper = published(table.name, each.row.name, column)
            found = (value.value, value.low, value.high, seeds, paper)
            lines.append((each.row.name, *each.row.labels, column, *found))
    return to_csv(fields, lines)


def _differences_csv(lines: Iterable[PairLine]) -> str:
    """A line for each pair, column and way of testing."""
    fields = ("left", "right", "column", "by", "difference", "low", "high", "p", "p_holm", "test")
    rows: list[Sequence[object]] = []
    for line in lines:
        left, right, _ = line.pair
        paired, over = line.paired, line.over_seeds
        for by, found, corrected in (
            (_seeds_text(line.seeds), paired, line.p_holm),
            ("over seeds", over, None),
            ("seed by seed", line.seed_by_seed, None),
        ):
            if found is not None:
                ends = (found.value, found.low, found.high, found.p)
                rows.append((left, right, line.column, by, *ends, corrected, found.test))
    return to_csv(fields, rows)


def _draw(table: TableValues, folder: Path) -> list[Path]:
    """Figure 4: MMAvg with and without CFS, as bars with their intervals; settings without a number leave a gap."""
    sizes = list(dict.fromkeys(each.row.labels[1:3] for each in table.rows))
    values = {each.row.labels[1:]: each.values.get(MEAN_TITLE) for each in table.rows}
    paths = [folder / f"figure4.{kind}" for kind in ("png", "svg")]
    highs = [0.0]
    with figure(paths, figsize=(8, 4), font_size=10, dpi=160) as (_, ((axes,),)):
        for side, (cfs, colour) in enumerate((("with", _WITH), ("without", _WITHOUT))):
            bars = [values[(*size, cfs)] or Estimate(None) for size in sizes]
            places = [place + (side - 0.5) * _BAR for place in range(len(sizes))]
            ends = np.array([(each.value, each.low, each.high) for each in bars], dtype=np.float64).T
            middle, low, high = ends  # NaN, which draws nothing, where there is none
            axes.bar(
                places,
                middle,
                _BAR * 0.94,
                yerr=[middle - low, high - middle],
                label=f"{cfs} CFS",
                color=colour,
                capsize=3,
                error_kw={"linewidth": 1},
            )
            highs += [float(top) for top in np.fmax(middle, high) if not np.isnan(top)]
            for place in np.array(places)[np.isnan(middle)]:
                axes.annotate(
                    "-", (place, 0), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points"
                )
        # From zero: bars are read by their length.
        axes.set_ylim(0, min(100.0, 1.08 * max(highs)) or 100)
        axes.set_xlim(-0.6, len(sizes) - 0.4)
        axes.set_xticks(range(len(sizes)), [f"E={factors}, r={rank}" for factors, rank in sizes])
        axes.set_ylabel(f"{MEAN_TITLE}, per cent")
        axes.set_title(table.layout.title, fontsize=11, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return paths
