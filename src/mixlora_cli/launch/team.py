"""Several processes that evaluate or measure together: who this one is, and where they wait for one another.

torchrun, SLURM or `launch.nproc` started them; only waiting goes through `torch.distributed`. What they tell
one another goes through files in the output folder, so with several nodes all must see it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from mixlora_cli.launch.group import group_left_at_exit

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""The first to finish waits for the last; a process that died is noticed by whoever started them."""


@dataclass(frozen=True)
class Team:
    """This process among those that work together."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this one speaks, and writes the results."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            distributed.barrier()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The others go through the block after the leader, and find in the cache what it has put there."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item: of items sorted by length, all get equally long ones."""
        return list(items[self.rank :: self.size])


@contextmanager
def joined(patience: timedelta = PATIENCE) -> Iterator[Team]:
    """The team that this process was started in, each on the GPU of its local rank; a team of one without others."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=patience)  # also beside GPUs: nothing but meetings
    with group_left_at_exit():
        yield Team(distributed.get_rank(), distributed.get_world_size())
