"""How far a measurement is: a bar in a terminal, a line for each finished task elsewhere; and what each task took."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mixlora_cli.errors import cut

TIMING = "timing.jsonl"
Advance = Callable[[], None]


@contextmanager
def batch_progress(console: Console, total: int, what: str = "gradients") -> Iterator[Advance]:
    """Give a function to be called after each batch; `total` batches are to come."""
    if not console.is_terminal or console.quiet or total == 0:
        yield lambda: None
        return
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def timed(folder: Path, console: Console, name: str, task: str, batches: int) -> Iterator[None]:
    """Note what a task took in `timing.jsonl` of `folder`, and say it."""
    start = time.monotonic()
    yield
    seconds = time.monotonic() - start
    row = {
        "pass": name,
        "task": task,
        "batches": batches,
        "seconds": round(seconds, 3),
        "peak_bytes": peak_memory(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / TIMING).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    console.print(
        f"{name}: {cut(task)}, {batches} batches in {seconds:.1f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def peak_memory() -> int:
    """Most bytes that were in use so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * scale
