"""The commands that Hydra configures: another one is an entry here, its class in `config`, and `conf/<name>.yaml`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand. Its root file in the configuration tree has its name, and begins with what --help says."""

    name: str
    help: str
    """The line in `mixlora --help`."""
    config: str
    """Class in `mixlora_cli.config`, imported when the command runs."""
    entry: str
    """`module:function` that takes the parsed configuration; imported only once that has been accepted."""
    groups: str = ""
    """Groups that --help lists, separated by commas."""
    first_word: str = ""
    """Key whose value a bare first argument is."""


_TRAINING = "model,adapter,routing,data,deepspeed,experiment"
_ALL = (
    Command(
        "train",
        "Train an adapter and save it in a run folder.",
        "TrainConfig",
        "mixlora_cli.launch:train",
        _TRAINING,
    ),
    Command(
        "eval",
        "Answer the unseen tasks with a trained run or the untuned base, and score the answers.",
        "EvalConfig",
        "mixlora_cli.launch:evaluate",
        "model,adapter,routing,data,judge",
    ),
    Command(
        "judge",
        "Have the answers of a finished evaluation judged: by a rule, a local language model or a server.",
        "JudgeCommandConfig",
        "mixlora_cli.judging.judge:judge",
        "judge",
    ),
    Command(
        "report",
        "Write results.md and report.html from stored evaluations, one or several side by side.",
        "ReportConfig",
        "mixlora_cli.report.run:report",
    ),
    Command(
        "align",
        "Stage one of the small model, picture -> caption; its result ships with the package.",
        "AlignConfig",
        "mixlora_cli.prepare.align.run:align",
    ),
    Command(
        "bench",
        "Measure what MixLoRA costs next to plain LoRA on this machine: time, memory, operations.",
        "BenchConfig",
        "mixlora_cli.analysis.bench.run:bench",
        "model,data",
    ),
    Command(
        "prepare",
        "Make once what a training needs: assemble a model, turn a data set into records.",
        "PrepareConfig",
        "mixlora_cli.prepare.run:prepare",
        "model,data",
    ),
    Command(
        "check",
        "Look for everything that is wrong with the data before a training starts.",
        "CheckConfig",
        "mixlora_cli.prepare.check:check",
        "model,data",
    ),
    Command(
        "export",
        "Fit a static LoRA to a MixLoRA adapter, to merge or to serve, and say what that loses.",
        "ExportConfig",
        "mixlora_cli.analysis.export.run:export",
        "model,data",
    ),
    Command(
        "plan",
        "Say what a training would need, before it is started: parameters, memory, operations, hours.",
        "PlanConfig",
        "mixlora_cli.analysis.plan:plan",
        _TRAINING,
    ),
    Command(
        "interference",
        "Measure how much tasks disturb one another's gradients, layer by layer, and draw it.",
        "InterferenceConfig",
        "mixlora_cli.launch:interference",
        "model,data",
    ),
    Command(
        "tsne",
        "Draw a map of the factors that tasks select, and say how far it tells the tasks apart.",
        "TsneConfig",
        "mixlora_cli.analysis.selections.run:tsne",
        "model,data",
    ),
    Command(
        "reproduce",
        "Train and evaluate every row of one of the paper's tables, then print it; goes on where it was.",
        "ReproduceConfig",
        "mixlora_cli.reproduce.grid:reproduce",
        first_word="what",
    ),
    Command(
        "table",
        "One of the paper's tables from finished cells: intervals, paired tests, Markdown, LaTeX, CSV.",
        "TableConfig",
        "mixlora_cli.reproduce.table:table",
        first_word="what",
    ),
)
COMMANDS = {command.name: command for command in _ALL}
