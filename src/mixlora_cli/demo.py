"""`mixlora demo`: the untuned base, LoRA and MixLoRA on six tasks' held-out instances, before and after training.

It types for you what you would type yourself and shows each command; the runs stay in the folder.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mixlora_cli.commands import COMMANDS, key_value
from mixlora_cli.doctor import missing_packages
from mixlora_cli.errors import INSTALL_MINI, INTERRUPTED, UserError
from mixlora_cli.hydra_app import run_command
from mixlora_cli.output import require_writable

if TYPE_CHECKING:
    from mixlora_cli.report.answers import Evaluated, Shown
    from mixlora_cli.tables import Table

PICTURE_WIDTH = 122  # characters
_LONGEST = 60
"""Characters of a question or an answer that the screen shows; the page has all."""
# In this process, however many GPUs there are: it is a demonstration.
_TRAIN = replace(COMMANDS["train"], entry="mixlora_cli.training.train:train")
_EVAL = replace(COMMANDS["eval"], entry="mixlora_cli.evaluation.evaluate:evaluate")
_TASKS = "data.tasks=[object_category,count_digit,flag_naming,background_colour,shape_naming,left_or_right]"
_EVAL_OPTIONS = [_TASKS, "eval.seen=true", "eval.benchmarks=[]", "eval.limit=10"]


def demo(folder: Path) -> int:
    """Train, evaluate and report in the folder; returns the exit code of the first command that fails, else 0.

    Raises:
        UserError: packages of the small model or of its pictures are missing, or the folder cannot be written.
    """
    folder = folder.expanduser()  # the shell leaves `~` alone behind --output=
    require_writable(folder, "--output")
    if missing := missing_packages("mixlora-cli[mini]"):
        raise UserError(f"mixlora demo needs {', '.join(missing)}: {INSTALL_MINI}")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    start = time.monotonic()
    lora, mixlora, base = folder / "lora-r4", folder / "mixlora-plus-e16-r4", folder / "base"
    shared = ["experiment=demo", _TASKS, "overwrite=true", "rank=4"]
    evaluations = [base, lora / "eval", mixlora / "eval"]
    commands = [
        (_TRAIN, ["adapter=lora", *shared, key_value("output_dir", lora)]),
        (_TRAIN, ["adapter=mixlora_plus", "factors=16", *shared, key_value("output_dir", mixlora)]),
        (_EVAL, ["adapter=none", *_EVAL_OPTIONS, key_value("output_dir", base)]),
        (_EVAL, [key_value("run", lora), *_EVAL_OPTIONS]),
        (_EVAL, [key_value("run", mixlora), *_EVAL_OPTIONS]),
        (COMMANDS["report"], [key_value("runs", *evaluations), key_value("output_dir", folder)]),
    ]
    for number, (command, arguments) in enumerate(commands, start=1):
        typed = f"mixlora {command.name} {' '.join(map(_typed, arguments))}"
        console.print(f"\n[{number}/{len(commands)}] {typed}", style="bold")
        try:
            code = run_command(command, arguments)
        except SystemExit as stop:  # a training that was interrupted
            code = int(stop.code or 0)
        if code:
            if code == INTERRUPTED:
                console.print(
                    "mixlora demo begins anew when it is given again; resume=auto is for mixlora train"
                )
            return code
    _compare(evaluations, folder, console)
    console.print(
        f"\n{(time.monotonic() - start) / 60:.1f} minutes. A taste: 240 instances were learned from, ten of each task "
        "asked, hence the wide intervals.\n"
        f"look: {folder / 'report.html'}   all of it with the pictures, in a browser\n"
        f"next: mixlora ask {_typed(key_value('run', mixlora))} image=cat.png "
        '"What is this?"   (any picture of yours)\n'
        f"      mixlora serve {_typed(key_value('run', lora, mixlora))}   a page where the three answer side by side\n"
        "      mixlora train   MixLoRA, one pass over all 26 tasks"
    )
    return 0


def _typed(argument: str) -> str:
    """An argument as a shell takes it; brackets alone are left as they read best."""
    return shlex.quote(argument) if re.search(r"[^\w./:=,\[\]-]", argument) else argument


def _compare(evaluations: Sequence[Path], folder: Path, console: Console) -> None:
    """Scores by task, and what each model says to one instance of every task; also as a picture in the folder."""
    from mixlora_cli.evaluation.results import seen_table
    from mixlora_cli.report.answers import read_evaluated
    from mixlora_cli.tables import show

    runs = [read_evaluated(evaluation) for evaluation in evaluations]
    tables = [answers_table(runs), seen_table([(run.label, run.results) for run in runs])]
    picture = Console(record=True, force_terminal=True, file=io.StringIO(), width=PICTURE_WIDTH)
    for out in (console, picture):
        show(tables, out)
    picture.save_svg(str(folder / "table.svg"), title="mixlora demo")


def answers_table(runs: Sequence[Evaluated]) -> Table:
    """The first held-out instance of each task, the right answer, and what each model says."""
    from mixlora_cli.report.answers import sample
    from mixlora_cli.tables import Table

    first: dict[str, Shown] = {}
    for shown in sorted(sample(runs, sys.maxsize, 0), key=lambda shown: shown.instance.index):
        first.setdefault(shown.instance.benchmark, shown)
    lines = [
        (
            task,
            _cut(shown.instance.question),
            shown.instance.target,
            *(_cut(said.text) for said in shown.answers),
        )
        for task, shown in first.items()
    ]
    headings = ("task", "the first question of it", "right answer", *(run.label for run in runs))
    return Table("Before and after: what is said about a picture", headings, tuple(lines), len(headings))


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
