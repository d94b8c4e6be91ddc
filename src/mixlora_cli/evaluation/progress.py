"""How far an evaluation is: a bar in a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINES = 10
"""Plain lines in a whole evaluation."""


@contextmanager
def answer_progress(
    console: Console, done: int, total: int, verb: tuple[str, str] = ("answering", "answered")
) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many more instances were answered; `done` of `total` were before.

    `verb` says what happens to them, as it goes on and when it is done.
    """
    if console.is_terminal:
        columns = (
            TextColumn(verb[0]),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(verb[0], total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    yield _line_printer(console, done, total, verb[1])


def _line_printer(console: Console, done: int, total: int, verb: str) -> Callable[[int], None]:
    start, first, reported = time.monotonic(), done, done * LINES // max(total, 1)

    def advance(count: int) -> None:
        nonlocal done, reported
        done += count
        if (tenth := done * LINES // total) > reported:
            reported = tenth
            rate = (done - first) / max(time.monotonic() - start, 1e-9)
            console.print(
                f"{verb} {done}/{total}  {rate:.1f} instances/s  {(total - done) / rate:.0f} s left",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    return advance
