"""An effective batch size, split over processes and forward passes."""

from __future__ import annotations

import os

from mixlora_cli.config import OptimConfig
from mixlora_cli.errors import UserError


def accumulation_for(effective_batch: int, batch_size: int, world_size: int) -> int:
    """Forward passes that each process does per optimizer step, so that the step sees `effective_batch` instances.

    Args:
        effective_batch: instances per optimizer step, over all processes.
        batch_size: instances per process and forward pass.
        world_size: processes, one for each GPU.

    Raises:
        UserError: they do not divide; names the nearest splits that do.
    """
    together = batch_size * world_size
    if effective_batch % together == 0:
        return effective_batch // together
    raise UserError(
        f"train.effective_batch={effective_batch}: cannot be split over {world_size} processes with "
        f"train.batch_size={batch_size}, a multiple of {together} is needed; the nearest possible ones: "
        f"{', or '.join(_possible(effective_batch, batch_size, world_size))}"
    )


def accumulation(numbers: OptimConfig, world_size: int | None = None) -> int:
    """`train.accumulation`, or what `train.effective_batch` makes of it for this many processes.

    Args:
        world_size: processes; None takes what the launcher put into the environment, 1 without launcher.

    Raises:
        UserError: `train.effective_batch` cannot be split.
    """
    if numbers.effective_batch is None:
        return numbers.accumulation
    processes = launched_processes() if world_size is None else world_size
    return accumulation_for(numbers.effective_batch, numbers.batch_size, processes)


def launched_processes() -> int:
    """Number of processes that the launcher started (torchrun, deepspeed and SLURM scripts set WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _possible(effective_batch: int, batch_size: int, world_size: int) -> list[str]:
    """The changes of a single number that give a possible split, each as near as can be."""
    found = []
    if effective_batch % world_size == 0:
        near = _nearest_divisors(effective_batch // world_size, batch_size)
        found.append(f"train.batch_size={' or '.join(map(str, near))}")
    if effective_batch % batch_size == 0:
        near = _nearest_divisors(effective_batch // batch_size, world_size)
        found.append(f"{' or '.join(map(str, near))} processes")
    together = batch_size * world_size
    below = effective_batch // together * together
    near = [size for size in (below, below + together) if size > 0]
    found.append(f"train.effective_batch={' or '.join(map(str, near))}")
    return found


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The next divisor of `number` below `wanted` and the next above, where there are such."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return [n for n in divisors if n < wanted][-1:] + [n for n in divisors if n > wanted][:1]
