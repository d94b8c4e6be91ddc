"""The `mixlora` command: subcommands hand their arguments to Hydra; nothing heavy loads before they are checked."""

from __future__ import annotations

import typer

from mixlora_cli import __version__
from mixlora_cli.compare_cli import compare_command
from mixlora_cli.import_cli import OneLineMistakes, import_command

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


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train an adapter and save it in a run folder."""
    from mixlora_cli.config.schema import TrainConfig

    _run("train", TrainConfig, "mixlora_cli.launch.commands:train", context)


@app.command(name="eval", context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Answer the unseen tasks with a trained run or the untuned base, and score the answers."""
    from mixlora_cli.config.schema import EvalConfig

    _run("eval", EvalConfig, "mixlora_cli.launch.commands:evaluate", context)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def judge(context: typer.Context) -> None:
    """Have the answers of a finished evaluation judged: by a rule, a local language model or a server."""
    from mixlora_cli.config.judge import JudgeCommandConfig

    _run("judge", JudgeCommandConfig, "mixlora_cli.judging.run:judge", context)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def report(context: typer.Context) -> None:
    """Write results.md and report.html from stored evaluations, one or several side by side."""
    from mixlora_cli.config.report import ReportConfig

    _run("report", ReportConfig, "mixlora_cli.report.run:report", context)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def align(context: typer.Context) -> None:
    """Stage one of the small model, picture -> caption; its result ships with the package."""
    from mixlora_cli.config.schema import AlignConfig

    _run("align", AlignConfig, "mixlora_cli.alignment.run:align", context)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure what MixLoRA costs next to plain LoRA on this machine: time, memory, operations."""
    from mixlora_cli.config.bench import BenchConfig

    _run("bench", BenchConfig, "mixlora_cli.bench.run:bench", context)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def prepare(context: typer.Context) -> None:
    """Make once what a training needs: assemble a model, turn a data set into records."""
    from mixlora_cli.config.prepare import PrepareConfig

    _run("prepare", PrepareConfig, "mixlora_cli.prepare.run:prepare", context)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def check(context: typer.Context) -> None:
    """Look for everything that is wrong with the data before a training starts."""
    from mixlora_cli.config.check import CheckConfig

    _run("check", CheckConfig, "mixlora_cli.checking.run:check", context)


app.command(name="import", cls=OneLineMistakes)(import_command)
app.command(name="compare", cls=OneLineMistakes)(compare_command)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def export(context: typer.Context) -> None:
    """Fit a static LoRA to a MixLoRA adapter, to merge or to serve, and say what that loses."""
    from mixlora_cli.config.export import ExportConfig

    _run("export", ExportConfig, "mixlora_cli.export.run:export", context)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def plan(context: typer.Context) -> None:
    """Say what a training would need, before it is started: parameters, memory, operations, hours."""
    from mixlora_cli.config.plan import PlanConfig

    _run("plan", PlanConfig, "mixlora_cli.planning.run:plan", context)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def interference(context: typer.Context) -> None:
    """Measure how much tasks disturb one another's gradients, layer by layer, and draw it."""
    from mixlora_cli.config.interference import InterferenceConfig

    _run("interference", InterferenceConfig, "mixlora_cli.launch.commands:interference", context)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def tsne(context: typer.Context) -> None:
    """Draw a map of the factors that tasks select, and say how far it tells the tasks apart."""
    from mixlora_cli.config.tsne import TsneConfig

    _run("tsne", TsneConfig, "mixlora_cli.selections.run:tsne", context)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def reproduce(context: typer.Context) -> None:
    """Train and evaluate every row of one of the paper's tables, then print it; goes on where it was."""
    from mixlora_cli.config.reproduce import ReproduceConfig

    _run("reproduce", ReproduceConfig, "mixlora_cli.reproduction.run:reproduce", context, first_word="what")


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def table(context: typer.Context) -> None:
    """One of the paper's tables from finished cells: intervals, paired tests, Markdown, LaTeX, CSV."""
    from mixlora_cli.config.table import TableConfig

    _run("table", TableConfig, "mixlora_cli.tables.run:table", context, first_word="what")


def _run(name: str, config_class: type, entry: str, context: typer.Context, first_word: str = "") -> None:
    """Hand over to Hydra; a bare first argument is the value of the key `first_word`, where there is one."""
    from mixlora_cli.config.hydra_app import Command, run_command

    arguments = list(context.args)
    if first_word and arguments and arguments[0].isalnum():
        arguments[0] = f"{first_word}={arguments[0]}"
    raise typer.Exit(run_command(Command(name, config_class, entry), arguments))


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
