"""What the judges say, as tables: the paper's columns for a terminal (rich) and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixlora_cli.evaluation.benchmarks import COLUMNS
from mixlora_cli.evaluation.results import Judged, JudgedScore, Results

MISSING = "-"
CAPTION = (
    "Per cent of answers that the judge calls right [95 % interval]. A reply that is neither Yes nor No is unparsed, "
    "and counts as wrong."
)
Row = tuple[str, Results]


def _scores(judged: Judged) -> list[JudgedScore]:
    return [*judged.scores, *(score for score in (judged.mean, judged.seen) if score is not None)]


def judged_columns(rows: Sequence[Row]) -> list[str]:
    """Headings of everything that some judge has judged, in the paper's order."""
    found = dict.fromkeys(s.column for _, results in rows for j in results.judged for s in _scores(j))
    known = [column for column in COLUMNS if column in found]
    return [*known, *(column for column in found if column not in COLUMNS)]


def judged_lines(rows: Sequence[Row], between: str = " ") -> list[list[str]]:
    """A line for each model and judge: label, judge, the scores, unparsed replies, agreement with the rule."""
    columns = judged_columns(rows)
    lines = []
    for label, results in rows:
        for judged in results.judged:
            by_column = {score.column: score for score in _scores(judged)}
            cells = [_cell(by_column.get(column), between) for column in columns]
            lines.append([label, judged.title, *cells, _unparsed(judged), _agreement(judged)])
    return lines


HEADINGS = ("unparsed", "agrees with")


def _cell(score: JudgedScore | None, between: str) -> str:
    return MISSING if score is None else f"{score.value:.1f}{between}[{score.low:.1f}, {score.high:.1f}]"


def _unparsed(judged: Judged) -> str:
    counted = [*judged.scores, *([judged.seen] if judged.seen else [])]
    return f"{sum(s.unparsed for s in counted)} of {sum(s.n for s in counted)}"


def _agreement(judged: Judged) -> str:
    return ", ".join(f"{title} {found.share:.1f} %" for title, found in judged.agreement.items()) or MISSING


def judged_markdown(rows: Sequence[Row]) -> str:
    """The lines as a Markdown table; "" where nothing was judged."""
    if not (lines := judged_lines(rows)):
        return ""
    columns = judged_columns(rows)
    head = [["", "judge", *columns, *HEADINGS], ["---", "---", *("---:" for _ in columns), "---:", "---"]]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [*head, *lines])
    return f"{table}\n\n{CAPTION}\n"


def print_judged(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the lines on their side, a column for each model and judge: it fits every terminal."""
    lines = judged_lines(rows)
    if not lines:
        return
    console = console or Console()
    table = Table(
        title="Judged", caption=CAPTION, title_justify="left", caption_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("")
    for label, judge, *_ in lines:
        table.add_column(Text(f"{label}\n{judge}"), justify="right")
    for position, heading in enumerate([*judged_columns(rows), *HEADINGS], start=2):
        table.add_row(heading, *(Text(line[position]) for line in lines))
    console.print(table)
