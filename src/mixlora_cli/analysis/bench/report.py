"""Everything a finished (or interrupted) benchmark hands over: console, results.json, performance.md, plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mixlora_cli.analysis.bench.plots import draw_ratios
from mixlora_cli.analysis.bench.results import FILE_NAME, Findings, write_results
from mixlora_cli.analysis.bench.tables import all_grids
from mixlora_cli.store import write_text

MARKDOWN = "performance.md"
FILE_WIDTH = 170
"""Characters of a line where the output is no terminal."""


def write_report(findings: Findings, folder: Path) -> list[Path]:
    """Write the files; returns their paths."""
    results, markdown = folder / FILE_NAME, folder / MARKDOWN
    write_results(findings, results)
    plots = draw_ratios(findings.comparisons, folder)
    write_text(markdown, as_markdown(findings, plots))
    return [results, markdown, *plots]


def print_report(findings: Findings, console: Console) -> None:
    """All tables."""
    if not console.is_terminal:
        console.width = FILE_WIDTH
    for grid in all_grids(findings):
        console.print(grid.rich())


def as_markdown(findings: Findings, plots: Sequence[Path]) -> str:
    """Machine, command, goals, tables and the plot: ready to be put into a document."""
    grids = all_grids(findings)
    parts = [_machine(findings), _command(findings), grids[0].markdown()]
    if plots:
        svg = next(path for path in plots if path.suffix == ".svg")
        parts.append(f"![Extra time of MixLoRA over that of LoRA, by width]({svg.name})\n")
    return "\n".join([*parts, *(grid.markdown() for grid in grids[1:])])


def _machine(findings: Findings) -> str:
    about = findings.machine
    bf16 = "with" if about["bf16_in_hardware"] else "without"
    where = "" if about["device"] == "cpu" else f", on {about['device']}"
    packages = about["versions"]["packages"]
    return (
        f"Measured on {about['processor']} ({about['cores']} cores, {about['memory_gib']} GiB, "
        f"{about['instructions']}, {bf16} bf16 in hardware){where}, {about['torch_threads']} threads; "
        f"torch {packages['torch']}, PEFT {packages['peft']}, transformers {packages['transformers']}.\n"
    )


def _command(findings: Findings) -> str:
    arguments = findings.machine["versions"]["command"][1:]
    return "To measure again:\n\n```bash\n" + " ".join(["mixlora bench", *arguments]) + "\n```\n"
