"""The processes of one measurement: each has its own tasks, and they meet between the passes.

What they tell one another goes through files in the output folder, so with several nodes all must see it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from mixlora_cli.launch.group import group_left_at_exit

T = TypeVar("T")
_PATIENCE = timedelta(days=2)
"""Processes wait for one another's tasks, which may take hours."""


@dataclass(frozen=True)
class Processes:
    """This process among all of them."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """It is the one that speaks and writes what all found."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> list[T]:
        """Those of the things that are this process's to do."""
        return list(things[self.rank :: self.count])

    def meet(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block before the others begin it: they find what it has built."""
        if not self.first:
            self.meet()
        yield
        if self.first:
            self.meet()


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the group that this process was started in; alone without one. Each takes the GPU of its local rank."""
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if count == 1:
        yield Processes()
        return
    # Nothing but meetings goes through the group, so gloo does, also beside GPUs.
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    with group_left_at_exit():
        yield Processes(rank, count)
