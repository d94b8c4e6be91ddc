"""Results as tables: the paper's columns with 95 % intervals, for a terminal (rich) and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixlora_cli.errors import cut
from mixlora_cli.evaluation.benchmarks import COLUMNS, MEAN_TITLE, benchmark_named, seen_title
from mixlora_cli.evaluation.results import Results, Score
from mixlora_cli.evaluation.scoring import SEEN_TITLE
from mixlora_cli.evaluation.tallies import mme_subtasks

Row = tuple[str, Results]
MISSING = "-"
CAPTION = "[...]: 95 % interval. MME in points, the rest in per cent; MMAvg is the mean of the seven others."
SEEN_CAPTION = " Seen: held-out instances of the training tasks."
FILE_WIDTH = 150
"""Characters of a line where the output is no terminal: nothing wraps in a log file."""


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Headings: the paper's eight, MMAvg, benchmarks of the user's own, and Seen where some row has it."""
    own = dict.fromkeys(score.column for _, results in rows for score in results.scores)
    seen = [SEEN_TITLE] if any(results.seen for _, results in rows) else []
    return [*COLUMNS, MEAN_TITLE, *(column for column in own if column not in COLUMNS), *seen]


def score_of(results: Results, column: str) -> Score | None:
    """The score under a heading of `columns_of`."""
    if column == MEAN_TITLE:
        return results.mean
    return results.seen if column == SEEN_TITLE else results.column(column)


def score_text(score: Score | None, between: str) -> str:
    """The value, its interval behind `between`, and behind another how much of a sum is there if not all."""
    if score is None:
        return MISSING
    return between.join(filter(None, (number_text(score, between), subtasks_text(score))))


def subtasks_text(score: Score) -> str:
    """`9 of 14 subtasks` where a sum lacks some, so that it is not read as a whole one; else ""."""
    whole, found = benchmark_named(score.name).num_subtasks, len(mme_subtasks(score.parts))
    return f"{found} of {whole} subtasks" if 0 < found < whole else ""


def number_text(score: Score, between: str) -> str:
    """The value with one decimal (points: none) and its interval behind `between`."""
    digits = 0 if score.unit == "points" else 1
    return f"{score.value:.{digits}f}{between}[{score.low:.{digits}f}, {score.high:.{digits}f}]"


def _new_table(title: str | None, caption: str | None = None) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )


def comparison_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """A row for each (label, results), a column for each benchmark; the interval stands below the value."""
    columns = columns_of(rows)
    table = _new_table(title, CAPTION + (SEEN_CAPTION if SEEN_TITLE in columns else ""))
    table.add_column("")
    for column in columns:
        table.add_column(cut(column), justify="right")
    for label, results in rows:
        table.add_row(Text(label), *(Text(score_text(score_of(results, column), "\n")) for column in columns))
    return table


def narrow_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """The same turned on its side, for terminals that the paper's columns do not fit."""
    columns = columns_of(rows)
    table = _new_table(title, CAPTION + (SEEN_CAPTION if SEEN_TITLE in columns else ""))
    table.add_column("")
    for label, _ in rows:
        table.add_column(Text(label), justify="right")
    for column in columns:
        table.add_row(cut(column), *(Text(score_text(score_of(results, column), " ")) for _, results in rows))
    return table


def comparison_markdown(rows: Sequence[Row]) -> str:
    """The same as a Markdown table, caption below."""
    columns = columns_of(rows)
    lines = [["", *columns], ["---", *("---:" for _ in columns)]]
    lines += [
        [label, *(score_text(score_of(results, column), " ") for column in columns)]
        for label, results in rows
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{CAPTION}{SEEN_CAPTION if SEEN_TITLE in columns else ''}\n"


def seen_table(rows: Sequence[Row]) -> Table:
    """Held-out accuracy on the tasks of training: a line for each task and the mean, a column a model."""
    table = _new_table("Seen tasks, held-out instances: exact match in per cent [95 % interval]")
    scored = [(label, results.seen) for label, results in rows if results.seen is not None]
    frequent = {task: part.get("most_frequent") for _, seen in scored for task, part in seen.parts.items()}
    table.add_column("task")
    table.add_column("most frequent answer", justify="right")
    for label, _ in scored:
        table.add_column(Text(label), justify="right")
    for task, share in frequent.items():
        chance = MISSING if share is None else f"{share:.1f}"
        table.add_row(
            Text(cut(seen_title(task))), chance, *(Text(_part_text(seen, task)) for _, seen in scored)
        )
    known = [share for share in frequent.values() if share is not None]
    mean = f"{sum(known) / len(known):.1f}" if known else MISSING
    table.add_section()
    table.add_row("mean", mean, *(Text(score_text(seen, " ")) for _, seen in scored))
    return table


def _part_text(seen: Score, task: str) -> str:
    part = seen.parts.get(task)
    return f"{part['accuracy']:.1f} [{part['low']:.1f}, {part['high']:.1f}]" if part else MISSING


def print_comparison(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the paper's table, and that of the seen tasks where some row has them."""
    console = console or Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    if any(results.scores for _, results in rows):
        title = f"Unseen tasks{_sample_note(rows)}"
        table = comparison_table(rows, title)
        unlimited = console.options.update(width=10 * FILE_WIDTH)
        fits = console.measure(table, options=unlimited).maximum <= console.width
        console.print(table if fits else narrow_table(rows, title))
    if any(results.seen for _, results in rows):
        console.print(seen_table(rows))


def _sample_note(rows: Sequence[Row]) -> str:
    limits = sorted({int(limit) for _, results in rows if (limit := results.about.get("limit"))})
    return f" (samples of at most {', '.join(map(str, limits))} instances each)" if limits else ""
