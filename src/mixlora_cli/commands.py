"""The commands that Hydra configures: another one is a line here, its class in `config`, and `conf/<name>.yaml`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from mixlora_cli.paths import conf_dir


@dataclass(frozen=True)
class Command:
    """A subcommand; its root file in the configuration tree has its name."""

    name: str
    config: str
    """Class in `mixlora_cli.config`, imported when the command runs."""
    entry: str
    """`module:function` that takes the parsed configuration; imported only once that has been accepted."""
    groups: str = ""
    """Groups that --help lists, separated by commas."""
    bare: str = ""
    """Key whose value an argument without a key is."""
    texts: tuple[str, ...] = ()
    """Keys whose values are sentences."""

    def head(self) -> str:
        """The comment that the root file begins with: what it does, usage and examples."""
        lines = (conf_dir() / f"{self.name}.yaml").read_text(encoding="utf-8").splitlines()
        return "\n".join(line[2:] for line in takewhile(lambda line: line.startswith("#"), lines))


_TRAINING = "model,adapter,routing,data,deepspeed,experiment"
_SENTENCES = ("question", "system", "definition", "task")
_ALL = (
    Command("train", "TrainConfig", "mixlora_cli.launch:train", _TRAINING),
    Command("eval", "EvalConfig", "mixlora_cli.launch:evaluate", "model,adapter,routing,data,judge"),
    Command("judge", "JudgeCommandConfig", "mixlora_cli.judging.judge:judge", "judge"),
    Command("report", "ReportConfig", "mixlora_cli.report.run:report"),
    Command("align", "AlignConfig", "mixlora_cli.prepare.align.run:align"),
    Command("bench", "BenchConfig", "mixlora_cli.analysis.bench.run:bench", "model,data,adapter,routing"),
    Command("prepare", "PrepareConfig", "mixlora_cli.prepare.run:prepare", "model,data"),
    Command("check", "CheckConfig", "mixlora_cli.prepare.check:check", "model,data"),
    Command("export", "ExportConfig", "mixlora_cli.analysis.export.run:export", "model,data"),
    Command("ask", "AskConfig", "mixlora_cli.serving.ask:ask", "model", "question", _SENTENCES),
    Command("serve", "ServeConfig", "mixlora_cli.serving.server:serve", "model", bare="port"),
    Command("plan", "PlanConfig", "mixlora_cli.analysis.plan_output:plan", _TRAINING),
    Command("interference", "InterferenceConfig", "mixlora_cli.launch:interference", "model,data"),
    Command("tsne", "TsneConfig", "mixlora_cli.analysis.selections.run:tsne", "model,data"),
    Command("reproduce", "ReproduceConfig", "mixlora_cli.reproduce.grid:reproduce", bare="what"),
    Command("table", "TableConfig", "mixlora_cli.reproduce.table:table", bare="what"),
)
COMMANDS = {command.name: command for command in _ALL}
HEADINGS = {
    "Train and use": ("demo", "train", "ask", "serve", "export"),
    "Understand": ("eval", "compare", "judge", "report", "interference", "tsne"),
    "Reproduce": ("reproduce", "table", "bench", "plan"),
    "Maintain": ("prepare", "check", "import", "align", "doctor"),
}
"""How `mixlora --help` lists all commands, those without Hydra included."""


def quoted(text: str) -> str:
    """A text as Hydra reads it back, whatever is in it."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return "'" + escaped.replace("${", "\\${") + "'"


def key_value(key: str, *places: Path) -> str:
    """`key=place`, or a list of several; places are quoted only where Hydra would read something else."""
    plain = [str(place) if re.fullmatch(r"[\w./-]+", str(place)) else quoted(str(place)) for place in places]
    return f"{key}={plain[0]}" if len(plain) == 1 else f"{key}=[{','.join(plain)}]"
