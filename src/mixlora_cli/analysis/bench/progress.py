"""How far a benchmark is: a bar in a terminal, a line for each case in a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

StartCase = Callable[[str], None]


@contextmanager
def case_progress(console: Console, done: int, total: int) -> Iterator[StartCase]:
    """Give a function that is told the name of each case as it starts; `done` of `total` were measured before."""
    if not console.is_terminal:
        yield _line_printer(console, done, total)
        return
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("measuring", total=total, completed=done)
        running = False

        def start(label: str) -> None:
            nonlocal running
            bar.update(task, description=label, advance=int(running))
            running = True

        yield start
        bar.update(task, description="measured", completed=total)


def _line_printer(console: Console, done: int, total: int) -> StartCase:
    begin = time.monotonic()

    def start(label: str) -> None:
        nonlocal done
        done += 1
        seconds = time.monotonic() - begin
        console.print(
            f"{done}/{total}  {label}  (after {seconds:.0f} s)", markup=False, highlight=False, soft_wrap=True
        )

    return start
