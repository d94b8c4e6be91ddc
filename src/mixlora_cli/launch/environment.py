"""Whether this process already is one of several, and which: torchrun, deepspeed and SLURM say so in variables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mixlora_cli.errors import UserError

_RANK_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def cluster_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The variables that torch reads to join a group that somebody else started; None where nobody did.

    torchrun and deepspeed set them themselves. A SLURM step of several tasks is translated.

    Raises:
        UserError: RANK is set, but not all that belongs to it.
    """
    if "RANK" in environment:
        lacking = [key for key in _RANK_KEYS if key not in environment]
        if lacking:
            raise UserError(
                f"RANK={environment['RANK']} is set in the environment, but {', '.join(lacking)} is not: start with "
                "torchrun or deepspeed, which set all of them, or unset RANK to let launch.nproc start the processes"
            )
        return {key: environment[key] for key in _RANK_KEYS}
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return _of_slurm(environment)
    return None


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """A SLURM step's own names -> torch's; a port that all tasks of the step agree on without speaking."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "localhost"
    job, step = (int(environment.get(key, "0")) for key in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(20_000 + (job * 31 + step) % 20_000)),
    }


def first_host(nodes: str) -> str:
    """First name of a SLURM node list: "gpu[007-010,012],login1" -> "gpu007"."""
    found = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    return "localhost" if found is None else found[1] + (found[2] or "")


def global_rank() -> int:
    """This process among all of them; 0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside; afterwards the environment is what it was, whoever else changed it."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)


def threads_each(processes: int) -> int:
    """Processor cores for each of so many processes on this node, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // processes, 1)
