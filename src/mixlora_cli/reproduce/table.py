"""`mixlora table`: read cells, print the table, write it as Markdown, LaTeX and CSV."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mixlora_cli.config import TableConfig
from mixlora_cli.reproduce.build import build_table
from mixlora_cli.reproduce.differences import pair_lines
from mixlora_cli.reproduce.sheet import differences_sheet, values_sheet
from mixlora_cli.reproduce.write import show, write_files


def table(config: TableConfig) -> list[Path]:
    """Print one table; returns the files that were written.

    Raises:
        UserError: the folder has no cells, or two evaluations that are compared have other data.
    """
    values = build_table(config)
    lines = pair_lines(values)
    sheets = [values_sheet(values, config.scale)]
    if lines:
        sheets.append(differences_sheet(values, lines))
    show(sheets)
    folder = Path(config.output_dir).expanduser()
    written = write_files(folder, values, sheets, lines)
    if values.layout.name == "figure4":
        from mixlora_cli.reproduce.figure import draw

        written += draw(values, folder)
    Console(soft_wrap=True).print(f"written: {', '.join(map(str, written))}", markup=False, highlight=False)
    return written
