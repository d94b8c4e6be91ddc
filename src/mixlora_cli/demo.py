"""`make demo`: the untuned base, LoRA and MixLoRA on the small model and the built-in tasks, side by side in one table.

It types for you what you would type yourself and shows each command; the runs stay in `runs/demo`.
"""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mixlora_cli.commands import COMMANDS
from mixlora_cli.hydra_app import run_command
from mixlora_cli.surroundings import settle_in

ROOT = Path("runs/demo")
PICTURE_WIDTH = 150  # characters
# In this process, however many GPUs there are: it is a demonstration.
_TRAIN = replace(COMMANDS["train"], entry="mixlora_cli.training.train:train")
_EVAL = replace(COMMANDS["eval"], entry="mixlora_cli.evaluation.evaluate:evaluate")
_EVAL_OPTIONS = ["eval.limit=16", "eval.batch_size=32"]


def main() -> int:
    """Run the demo; returns the exit code of the first command that fails, else 0."""
    settle_in()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    start = time.monotonic()
    lora, mixlora, base = ROOT / "lora-r4", ROOT / "mixlora-e16-r4", ROOT / "base"
    shared = ["experiment=demo", "overwrite=true", "rank=4"]
    commands = [
        (_TRAIN, ["adapter=lora", *shared, f"output_dir={lora}"]),
        (_TRAIN, ["adapter=mixlora", "factors=16", *shared, f"output_dir={mixlora}"]),
        (_EVAL, ["adapter=none", *_EVAL_OPTIONS, f"output_dir={base}"]),
        (_EVAL, [f"run={lora}", *_EVAL_OPTIONS]),
        (_EVAL, [f"run={mixlora}", *_EVAL_OPTIONS]),
    ]
    for number, (command, arguments) in enumerate(commands, start=1):
        console.print(
            f"\n[{number}/{len(commands)}] mixlora {command.name} {' '.join(arguments)}", style="bold"
        )
        if code := run_command(command, arguments):
            return code
    _compare([base, lora / "eval", mixlora / "eval"], console)
    console.print(
        f"\n{(time.monotonic() - start) / 60:.1f} minutes. This was a taste: a few steps, few instances of each task, "
        "wide intervals.\nnext: mixlora train                (MixLoRA, one pass over all training instances)\n"
        "      mixlora eval run=<its folder>  (all instances of the unseen tasks)"
    )
    return 0


def _compare(folders: list[Path], console: Console) -> None:
    """One row a model; on the screen, and as a picture and Markdown beside the runs."""
    from mixlora_cli.evaluation.results import (
        print_results,
        read_results,
        results_markdown,
        results_table,
    )
    from mixlora_cli.tables import show

    rows = [(result.label, result) for result in (read_results(folder) for folder in folders)]
    console.print("\nThe untuned base, LoRA and MixLoRA side by side", style="bold")
    print_results(rows)
    (ROOT / "table.md").write_text(results_markdown(rows), encoding="utf-8")
    picture = Console(record=True, file=io.StringIO(), width=PICTURE_WIDTH)
    show(results_table(rows), picture)
    picture.save_svg(str(ROOT / "table.svg"), title="make demo")
    console.print(f"the same as a picture and as Markdown: {ROOT / 'table.svg'}, {ROOT / 'table.md'}")


if __name__ == "__main__":
    sys.exit(main())
