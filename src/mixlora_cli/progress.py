"""A progress bar for long work: there while it goes on, gone when it is done, nothing where nobody looks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def with_bar(
    items: Iterable[T], title: str, console: Console, total: float | None = None, hidden: bool = False
) -> Iterable[T]:
    """`items`, one by one, with a bar on `console` if that is a terminal.

    Args:
        items: what is gone through.
        title: what is being done, as in "reading records".
        console: where the bar stands; anything but a terminal gets none.
        total: how many items there are, where `items` has no length.
        hidden: no bar at all.
    """
    return track(
        items, title, total, console=console, transient=True, disable=hidden or not console.is_terminal
    )
