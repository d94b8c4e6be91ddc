"""The `mixlora` command: subcommands hand their arguments to Hydra; nothing heavy loads before they are checked."""

from __future__ import annotations

from importlib import import_module

import typer

from mixlora_cli import __version__
from mixlora_cli.compare_cli import compare_command
from mixlora_cli.prepare.import_cli import OneLineMistakes, import_command
from mixlora_cli.surroundings import settle_in

HYDRA_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}

EXAMPLES = """
Every subcommand is configured with Hydra: choose a group's option (adapter=lora), change a key (rank=8),
sweep over values (-m rank=2,4,8).

\b
  mixlora train                                 MixLoRA on the small model and the built-in tasks
  mixlora train adapter=lora rank=8             plain LoRA instead
  mixlora eval run=FOLDER                       score a finished training on the unseen tasks
  mixlora train --help                          all groups, options and keys
"""

app = typer.Typer(
    name="mixlora",
    help="Train and evaluate mixtures of low-rank factors (MixLoRA) next to plain LoRA, on vision-language models.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
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


def _configured_by_hydra(
    name: str, help_line: str, config_class: str, entry: str, first_word: str = ""
) -> None:
    """Add a subcommand that hands its arguments to Hydra.

    Args:
        config_class: `module:class`, imported when the command runs.
        entry: `module:function` that takes the parsed configuration; imported once that has been accepted.
        first_word: key whose value a bare first argument is, where the command has one.
    """

    def run(context: typer.Context) -> None:
        from mixlora_cli.hydra_app import Command, run_command

        arguments = list(context.args)
        if first_word and arguments and arguments[0].isalnum():
            arguments[0] = f"{first_word}={arguments[0]}"
        module, _, attribute = config_class.partition(":")
        command = Command(name, getattr(import_module(module), attribute), entry)
        raise typer.Exit(run_command(command, arguments))

    app.command(name, help=help_line, context_settings=HYDRA_ARGUMENTS, add_help_option=False)(run)


_configured_by_hydra(
    "train",
    "Train an adapter and save it in a run folder.",
    "mixlora_cli.config:TrainConfig",
    "mixlora_cli.launch:train",
)
_configured_by_hydra(
    "eval",
    "Answer the unseen tasks with a trained run or the untuned base, and score the answers.",
    "mixlora_cli.config:EvalConfig",
    "mixlora_cli.launch:evaluate",
)
_configured_by_hydra(
    "judge",
    "Have the answers of a finished evaluation judged: by a rule, a local language model or a server.",
    "mixlora_cli.config:JudgeCommandConfig",
    "mixlora_cli.judging.judge:judge",
)
_configured_by_hydra(
    "report",
    "Write results.md and report.html from stored evaluations, one or several side by side.",
    "mixlora_cli.config:ReportConfig",
    "mixlora_cli.report.run:report",
)
_configured_by_hydra(
    "align",
    "Stage one of the small model, picture -> caption; its result ships with the package.",
    "mixlora_cli.config:AlignConfig",
    "mixlora_cli.prepare.align.run:align",
)
_configured_by_hydra(
    "bench",
    "Measure what MixLoRA costs next to plain LoRA on this machine: time, memory, operations.",
    "mixlora_cli.config:BenchConfig",
    "mixlora_cli.analysis.bench.run:bench",
)
_configured_by_hydra(
    "prepare",
    "Make once what a training needs: assemble a model, turn a data set into records.",
    "mixlora_cli.config:PrepareConfig",
    "mixlora_cli.prepare.run:prepare",
)
_configured_by_hydra(
    "check",
    "Look for everything that is wrong with the data before a training starts.",
    "mixlora_cli.config:CheckConfig",
    "mixlora_cli.prepare.check:check",
)
app.command(name="import", cls=OneLineMistakes)(import_command)
app.command(name="compare", cls=OneLineMistakes)(compare_command)
_configured_by_hydra(
    "export",
    "Fit a static LoRA to a MixLoRA adapter, to merge or to serve, and say what that loses.",
    "mixlora_cli.config:ExportConfig",
    "mixlora_cli.analysis.export.run:export",
)
_configured_by_hydra(
    "plan",
    "Say what a training would need, before it is started: parameters, memory, operations, hours.",
    "mixlora_cli.config:PlanConfig",
    "mixlora_cli.analysis.plan:plan",
)
_configured_by_hydra(
    "interference",
    "Measure how much tasks disturb one another's gradients, layer by layer, and draw it.",
    "mixlora_cli.config:InterferenceConfig",
    "mixlora_cli.launch:interference",
)
_configured_by_hydra(
    "tsne",
    "Draw a map of the factors that tasks select, and say how far it tells the tasks apart.",
    "mixlora_cli.config:TsneConfig",
    "mixlora_cli.analysis.selections.run:tsne",
)
_configured_by_hydra(
    "reproduce",
    "Train and evaluate every row of one of the paper's tables, then print it; goes on where it was.",
    "mixlora_cli.config:ReproduceConfig",
    "mixlora_cli.reproduce.grid:reproduce",
    first_word="what",
)
_configured_by_hydra(
    "table",
    "One of the paper's tables from finished cells: intervals, paired tests, Markdown, LaTeX, CSV.",
    "mixlora_cli.config:TableConfig",
    "mixlora_cli.reproduce.table:table",
    first_word="what",
)


def main() -> None:
    """Entry point of the console script."""
    settle_in()
    app()


if __name__ == "__main__":
    main()
