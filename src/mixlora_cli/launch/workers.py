"""Run a function in this process, in processes that torch's elastic launcher starts, or as one that others started."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixlora_cli.config import LaunchConfig
from mixlora_cli.errors import UserError, WorkerFailed
from mixlora_cli.launch.environment import cluster_environment, threads_each, variables
from mixlora_cli.launch.failures import first_failure, killed
from mixlora_cli.launch.signals import PassOn
from mixlora_cli.launch.worker import Exited, resolve, work

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_ABORT = -6  # SIGABRT: how a communication library ends its process when another one is gone


def run_workers(function: str, config: Any, launch: LaunchConfig, own_process: bool = False) -> Any:
    """Run `function(config)` in as many processes as asked for and return the result of the first one on this node.

    In a process that torchrun, deepspeed or SLURM started as one of several, the function runs right here and joins
    the others. With a single process it runs right here, too.

    Args:
        function: `module:name`; imported only where it runs. In several processes, a `SystemExit` must leave it in all.
        config: its argument; pickled for other processes, as the result is.
        own_process: start a process of its own even for a single one (for libraries that leave traces in theirs).

    Raises:
        UserError: a user's mistake in any of them, once, whichever came first.
        WorkerFailed: another error there, with rank and traceback.
        SystemExit: the function left through it, or a signal came: 128 + its number.
    """
    cluster = cluster_environment(os.environ)
    if cluster is not None and launch.nnodes == 1:
        return _join(function, config, cluster)
    processes = _visible_gpus() if launch.nproc is None else launch.nproc
    if processes == launch.nnodes == 1 and not own_process:
        return resolve(function)(config)
    return _start(function, config, launch, processes)


def _join(function: str, config: Any, cluster: dict[str, str]) -> Any:
    with variables(cluster):
        try:
            return resolve(function)(config)
        except UserError as error:
            raise UserError(f"rank {cluster['RANK']}: {error}") from error


def _start(function: str, config: Any, launch: LaunchConfig, processes: int) -> Any:
    """Start the processes of this node and wait for them."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixlora-")))
        signals = PassOn(folder)
        threads = os.environ.get("OMP_NUM_THREADS", str(threads_each(processes)))
        stack.enter_context(variables({"OMP_NUM_THREADS": threads}))
        stack.enter_context(_no_logging())
        stack.enter_context(signals.listening())
        try:
            results = elastic_launch(_torch_config(launch, processes, folder), work)(function, config, folder)
        except ChildFailedError as error:
            if signals.signum is not None:
                raise SystemExit(128 + signals.signum) from None
            raise _cause(error, folder) from None
    result = results[min(results)]
    if isinstance(result, Exited):
        raise SystemExit(result.code if signals.signum is None else 128 + signals.signum)
    return result


def _torch_config(launch: LaunchConfig, processes: int, folder: Path) -> Any:
    """The settings of torch's launcher: no restarts, and the nodes that were asked for or none."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig as TorchConfig

    alone = launch.nnodes == 1
    return TorchConfig(
        min_nodes=launch.nnodes,
        max_nodes=launch.nnodes,
        nproc_per_node=processes,
        run_id="mixlora",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0" if alone else str(launch.rdzv_endpoint),
        # A machine's own name cannot be resolved everywhere.
        local_addr="127.0.0.1" if alone else None,
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "torch")),
        signals_to_handle="SIGHUP,SIGQUIT",
    )


def _cause(error: ChildFailedError, folder: Path) -> UserError | WorkerFailed:
    """The failure that came first; what killed a worker from outside comes before what the others noted about it."""
    rank, found = error.get_first_failure()
    noted = first_failure(folder)
    if noted is None or (found.exitcode < 0 and found.exitcode != _ABORT):
        return killed(rank, found.exitcode)
    return noted.as_error()


@contextmanager
def _no_logging() -> Iterator[None]:
    """Keep quiet: torch's launcher logs every failure at length; here it is said once, at the end."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _visible_gpus() -> int:
    """Visible GPUs, at least one process."""
    import torch

    return max(torch.cuda.device_count(), 1)
