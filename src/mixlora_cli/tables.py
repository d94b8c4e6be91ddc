"""Tables of texts, the same for the screen, Markdown, LaTeX and CSV; a command only names its columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

FILE_WIDTH = 220
"""Characters of a line where the output is no terminal: nothing wraps in a log file."""
_PIPE = re.compile(r"(?<!\\)\|")
"""What would end a cell in Markdown, unless it is escaped already."""
_TEX = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "±": r"$\pm$"})


@dataclass(frozen=True)
class Cell:
    """What stands in one place: the number, its interval, and what is said beside it; the latter two may be empty."""

    value: str
    interval: str = ""
    beside: str = ""

    def joined(self, between: str) -> str:
        """All of it, with `between` where a line could break."""
        return between.join(part for part in (self.value, self.interval, self.beside) if part)


@dataclass(frozen=True)
class Table:
    """A table that is ready to be shown or written; the first `num_labels` columns hold words, the others numbers."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell | str, ...], ...]
    num_labels: int = 1
    notes: tuple[str, ...] = ()
    """Sentences below the table."""
    last_apart: bool = False
    """Whether a line divides the last row, as a mean, from the others."""

    def turned(self) -> Table:
        """Rows as columns, for terminals that the columns do not fit; labels of a row stand in one heading."""
        heads = (_joined(row[: self.num_labels], "\n") for row in self.rows)
        body = (
            (heading, *(_text(row[place], " ") for row in self.rows))
            for place, heading in enumerate(self.headings)
            if place >= self.num_labels
        )
        return replace(self, headings=("", *heads), rows=tuple(body), num_labels=1, last_apart=False)


def _joined(cells: Sequence[Cell | str], between: str) -> str:
    return between.join(_text(cell, " ") for cell in cells)


def _text(cell: Cell | str, between: str) -> str:
    return cell if isinstance(cell, str) else cell.joined(between)


def _as_rich(table: Table) -> RichTable:
    shown = RichTable(
        title=Text(table.title) if table.title else None,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for place, heading in enumerate(table.headings):
        shown.add_column(Text(heading), justify="left" if place < table.num_labels else "right")
    for number, row in enumerate(table.rows, start=1):
        if table.last_apart and number == len(table.rows):
            shown.add_section()
        shown.add_row(*(Text(_text(cell, "\n")) for cell in row))
    return shown


def show(tables: Table | Iterable[Table], console: Console | None = None, turn: bool = False) -> None:
    """Print tables and their notes; intervals stand below the values, so that nine columns fit.

    Args:
        tables: one or several.
        console: where; the standard output unless given.
        turn: print a table on its side where the terminal is too narrow for it.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    for table in [tables] if isinstance(tables, Table) else tables:
        shown = _as_rich(table)
        unlimited = console.options.update(width=10 * FILE_WIDTH)
        if turn and console.measure(shown, options=unlimited).maximum > console.width:
            shown = _as_rich(table.turned())
        console.print(shown)
        for note in table.notes:
            console.print(Text(note))
        if table.notes:
            console.print()


def markdown(tables: Table | Iterable[Table], level: int = 2) -> str:
    """A heading of this level, a table and the notes of each; no heading where the title is empty."""
    texts = []
    for table in [tables] if isinstance(tables, Table) else tables:
        rule = ["---" if place < table.num_labels else "---:" for place in range(len(table.headings))]
        head, *lines = (
            [_PIPE.sub(r"\\|", _text(cell, " ")) for cell in row] for row in (table.headings, *table.rows)
        )
        body = "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
        title = f"{'#' * level} {table.title}\n\n" if table.title else ""
        texts.append("\n\n".join([title + body, *table.notes]) + "\n")
    return "\n".join(texts)


def latex(tables: Iterable[Table]) -> str:
    r"""A `table*` of each table, with \usepackage{booktabs}."""
    return "\n".join(_latex_table(table) for table in tables)


def _latex_table(table: Table) -> str:
    numbers = len(table.headings) - table.num_labels
    lines = [
        r"\begin{table*}",
        r"\centering\small",
        rf"\begin{{tabular}}{{{'l' * table.num_labels}{'r' * numbers}}}",
        r"\toprule",
        " & ".join(map(_tex, table.headings)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_tex_cell, row)) + r" \\" for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_tex(table.title)}. {' '.join(map(_tex, table.notes))}}}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    name, subscript, below = text.partition("_")
    if subscript and name in ("LLaVA", "LoRA"):  # the paper's LLaVA_Align: no underscore, a subscript
        word, space, rest = below.partition(" ")
        return rf"{name}\textsubscript{{{word}}}{space}{rest.translate(_TEX)}"
    return text.translate(_TEX).replace("<", "$<$")


def _tex_cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return _tex(cell)
    extra = " ".join(part for part in (cell.interval, cell.beside) if part)
    # In braces, because a bracket right after \\ would be read as its argument.
    return _tex(cell.value) + (rf" {{\scriptsize {_tex(extra)}}}" if extra else "")


def to_csv(fields: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A line of headings and the lines of values; None is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows(["" if value is None else value for value in line] for line in lines)
    return text.getvalue()
