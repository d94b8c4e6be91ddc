"""How far a long count is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 4


@contextmanager
def counting(title: str, total: int, visible: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many more are done; writes to stderr."""
    console = Console(stderr=True)
    if not visible:
        yield lambda count: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        yield _by_lines(console, title, total)


def _by_lines(console: Console, title: str, total: int) -> Callable[[int], None]:
    """A function that prints a line at the start and after each quarter."""
    done, told = 0, 0
    console.print(f"{title}: {total} pictures", highlight=False)

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if done * _LINES // total > told:
            told = done * _LINES // total
            console.print(f"{title}: {done} of {total}", highlight=False)

    return advance
