"""What a command says while it works: lines of text without markup, and bars on terminals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

T = TypeVar("T")
Advance = Callable[..., None]
"""Told how many more are done (1 unless given), and what is worked on next, as `label`."""


def say(text: str, console: Console | None = None) -> None:
    """Print a line as it is, without markup and not wrapped; on the standard error unless a console is given."""
    (console or Console(stderr=True)).print(text, markup=False, highlight=False, soft_wrap=True)


def with_bar(
    items: Iterable[T],
    title: str,
    console: Console | None = None,
    total: float | None = None,
    hidden: bool = False,
) -> Iterable[T]:
    """`items`, one by one, with a bar if the console is a terminal, that is gone when they are.

    Args:
        items: what is gone through.
        title: what is being done, as in "reading records".
        console: where the bar stands; the standard error unless given.
        total: how many items there are, where `items` has no length.
        hidden: no bar at all.
    """
    console = console or Console(stderr=True)
    return track(
        items, title, total, console=console, transient=True, disable=hidden or not console.is_terminal
    )


@contextmanager
def counting(
    title: str,
    total: int,
    done: int = 0,
    console: Console | None = None,
    lines: int = 0,
    unit: str = "",
    finished: str = "",
) -> Iterator[Advance]:
    """Give a function that is told how many more are done: a bar on a terminal, plain lines in a file or a pipe.

    Args:
        title: what is being done, as in "answering".
        total: how many there are.
        done: how many of them were done before.
        console: where; the standard error unless given. A quiet one shows nothing.
        lines: how many lines the whole work gets where there is no terminal; 0 = none.
        unit: what is counted, as in "instances"; with it the lines also give the speed and the time that is left.
        finished: how the lines begin; the title unless given, as in "answered".
    """
    console = console or Console(stderr=True)
    if console.quiet or total == 0:
        yield lambda count=1, label=None: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda count=1, label=None: bar.update(task, advance=count, description=label)
    else:
        yield _lines(finished or title, total, done, console, lines, unit)


def _lines(title: str, total: int, done: int, console: Console, lines: int, unit: str) -> Advance:
    start, first, told = time.monotonic(), done, done * lines // total

    def advance(count: int = 1, label: str | None = None) -> None:
        nonlocal done, told
        done += count
        if done * lines // total > told:
            told = done * lines // total
            rate = (done - first) / max(time.monotonic() - start, 1e-9)
            pace = f"  {rate:.1f} {unit}/s  {(total - done) / rate:.0f} s left" if unit else ""
            say(f"{title} {done}/{total}{pace}", console)

    return advance
