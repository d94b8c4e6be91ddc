"""The options of `mixlora compare`; every mistake in them is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixlora_cli.errors import UserError


def compare_command(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Two or more evaluated runs; the others are compared with the first. Seeds of one model are joined by "
            "commas: lora-seed0,lora-seed1 mixlora-seed0,mixlora-seed1",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for compare.json and compare.md; default: the screen alone."
        ),
    ] = None,
) -> None:
    """Compare evaluated runs: differences with intervals and paired tests; over seeds, their means."""
    from mixlora_cli.errors import USER_MISTAKE, report
    from mixlora_cli.evaluation.compare import compare, print_comparisons, read_group, write_comparisons
    from mixlora_cli.output import one_line_errors

    try:
        if len(runs) < 2:
            raise UserError("compare: expected two or more runs: mixlora compare FOLDER1 FOLDER2")
        comparisons = compare([read_group(run) for run in runs])
        print_comparisons(comparisons)
        if output is not None:
            with one_line_errors(output, key="--output"):
                write_comparisons(comparisons, output)
    except UserError as error:
        report(error)
        raise typer.Exit(USER_MISTAKE) from error
