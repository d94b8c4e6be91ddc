"""The language-model head: the widest matrix product of a small model, and what it should be given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def head_reads(head: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `head` gets `change(hidden)` in the place of its hidden states (batch, length, d).

    Worth it where they are a slice of longer ones: torch multiplies a three-dimensional slice row by row, with a copy
    of the head's whole weight for each, which is 1.8 GB for 32 rows of the small model.
    """

    def changed(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(changed)
    try:
        yield
    finally:
        handle.remove()
