"""Sheets on the screen, as Markdown and LaTeX; values and differences as CSV with full digits."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixlora_cli.reproduce.build import TableValues
from mixlora_cli.reproduce.differences import PairLine
from mixlora_cli.reproduce.paper import published
from mixlora_cli.reproduce.sheet import Cell, Sheet, seeds_text
from mixlora_cli.reproduce.values import Value

FILE_WIDTH = 220
"""Characters of a line where the output is no terminal: nothing wraps in a log file."""
_TEX = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "±": r"$\pm$"})


def show(sheets: Iterable[Sheet], console: Console | None = None) -> None:
    """Print sheets; intervals stand below the values, so that nine columns fit."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    for sheet in sheets:
        table = Table(
            title=sheet.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        for place, heading in enumerate(sheet.headings):
            table.add_column(Text(heading), justify="left" if place < sheet.num_labels else "right")
        for row in sheet.rows:
            table.add_row(*(Text(cell.joined("\n")) for cell in row))
        console.print(table)
        for note in sheet.notes:
            console.print(Text(note))
        console.print()


def markdown(sheets: Iterable[Sheet]) -> str:
    """A heading, a table and the notes of each sheet."""
    texts = []
    for sheet in sheets:
        numbers = len(sheet.headings) - sheet.num_labels
        lines = [list(sheet.headings), [*["---"] * sheet.num_labels, *["---:"] * numbers]]
        lines += [[cell.joined(" ") for cell in row] for row in sheet.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        texts.append(f"## {sheet.title}\n\n{table}\n\n" + "\n\n".join(sheet.notes) + "\n")
    return "\n".join(texts)


def latex(sheets: Iterable[Sheet]) -> str:
    r"""A `table*` of each sheet, with \usepackage{booktabs}."""
    return "\n".join(_latex_table(sheet) for sheet in sheets)


def _latex_table(sheet: Sheet) -> str:
    numbers = len(sheet.headings) - sheet.num_labels
    lines = [
        r"\begin{table*}",
        r"\centering\small",
        rf"\begin{{tabular}}{{{'l' * sheet.num_labels}{'r' * numbers}}}",
        r"\toprule",
        " & ".join(map(_tex, sheet.headings)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_tex_cell, row)) + r" \\" for row in sheet.rows),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_tex(sheet.title)}. {' '.join(map(_tex, sheet.notes))}}}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    name, subscript, below = text.partition("_")
    if subscript and name in ("LLaVA", "LoRA"):  # the paper's LLaVA_Align: no underscore, a subscript
        word, space, rest = below.partition(" ")
        return rf"{name}\textsubscript{{{word}}}{space}{rest.translate(_TEX)}"
    return text.translate(_TEX).replace("<", "$<$")


def _tex_cell(cell: Cell) -> str:
    extra = " ".join(part for part in (cell.interval, cell.beside) if part)
    # In braces, because a bracket right after \\ would be read as its argument.
    return _tex(cell.value) + (rf" {{\scriptsize {_tex(extra)}}}" if extra else "")


def values_csv(table: TableValues) -> str:
    """A line for each row and column: value, interval, trainings, seeds, the paper's number."""
    fields = (
        "experiment",
        *map(str.lower, table.layout.headings),
        "column",
        "value",
        "low",
        "high",
        "seeds",
        "paper",
    )
    lines: list[list[object]] = []
    for each in table.rows:
        for column in table.columns:
            value, number = each.values.get(column), published(table.layout.name, each.row.experiment, column)
            found = ["", "", ""] if value is None else [value.value, *_ends(value)]
            seeds = " ".join(str(seed) for seed, values in each.by_seed.items() if column in values)
            paper = "" if number is None else number
            lines.append([each.row.experiment, *each.row.labels, column, *found, seeds, paper])
    return _csv(fields, lines)


def _ends(value: Value) -> list[object]:
    return ["" if end is None else end for end in (value.low, value.high)]


def differences_csv(lines: Sequence[PairLine]) -> str:
    """A line for each pair, column and way of testing."""
    fields = ("left", "right", "column", "by", "difference", "low", "high", "p", "p_holm", "test")
    rows: list[list[object]] = []
    for line in lines:
        holm = "" if line.p_holm is None else line.p_holm
        for by, found, corrected in (
            (seeds_text(line.paired_seeds), line.paired, holm),
            ("over seeds", line.seeds, ""),
        ):
            if found is not None:
                ends = [found.value, found.low, found.high, found.p]
                rows.append([line.pair.left, line.pair.right, line.column, by, *ends, corrected, found.test])
    return _csv(fields, rows)


def _csv(fields: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows(lines)
    return text.getvalue()


def write_files(
    folder: Path, table: TableValues, sheets: Sequence[Sheet], lines: Sequence[PairLine]
) -> list[Path]:
    """Everything beside one another, named after the table."""
    folder.mkdir(parents=True, exist_ok=True)
    name = table.layout.name
    contents = {
        f"{name}.md": markdown(sheets),
        f"{name}.tex": latex(sheets),
        f"{name}.csv": values_csv(table),
        f"{name}-differences.csv": differences_csv(lines),
    }
    for file, text in contents.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in contents]
