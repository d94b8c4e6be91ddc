"""Processes that worked together part before Python ends."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


@contextmanager
def group_left_at_exit() -> Iterator[None]:
    """After the block this process leaves its group, if any, when it ends: the jobs of a sweep share the group.

    A thread of gloo that still holds a tensor of the last collective needs the interpreter to let it go, and aborts the
    process where that is already gone; NCCL warns of leaked resources. After an error in the block the group is not
    left: that could wait for the others, who would lose the connection before whoever started them hears of the cause.
    """
    atexit.unregister(_leave)
    yield
    atexit.register(_leave)


def _leave() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
