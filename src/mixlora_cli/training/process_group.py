"""The processes that train together part before Python ends."""

from __future__ import annotations

import atexit

from torch import distributed


def leave_group_at_exit() -> None:
    """Have this process leave the group that it trained in, if any, when it ends; the jobs of a sweep share the group.

    A thread of gloo that still holds a tensor of the last collective needs the interpreter to let it go, and aborts the
    process where that is already gone; NCCL warns of leaked resources. To be called where all processes arrive: after
    an error, leaving could wait for the others.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
