"""The commands that run in several processes, as the command line calls them; nothing heavy is imported here."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from mixlora_cli.errors import UserError, WorkerFailed
from mixlora_cli.store import write_text
from mixlora_cli.surroundings import settle_in


def train(config: TrainConfig) -> Any:
    """`mixlora train`, in the processes that `launch` asks for. DeepSpeed never shares a process with another job."""
    uses_deepspeed = config.deepspeed.config is not None
    return run_workers("mixlora_cli.training.train:train", config, config.launch, own_process=uses_deepspeed)


def evaluate(config: EvalConfig) -> Any:
    """`mixlora eval`, in the processes that `launch` asks for; each answers its share of the instances."""
    return run_workers("mixlora_cli.evaluation.evaluate:evaluate", config, config.launch)


def interference(config: InterferenceConfig) -> Any:
    """`mixlora interference`; the processes share the tasks. Figures alone need no second process."""
    if config.draw_only:
        from mixlora_cli.analysis.interference.run import interference as run_here

        return run_here(config)
    return run_workers("mixlora_cli.analysis.interference.run:interference", config, config.launch)


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


def launched_processes() -> int:
    """Number of processes that the launcher started (torchrun, deepspeed and SLURM scripts set WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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


@dataclass(frozen=True)
class Failure:
    """An exception that ended a worker."""

    time: float
    """Seconds since the epoch."""
    rank: int
    mistake: bool
    """It was a `UserError`."""
    text: str
    """Message of a user's mistake, else the traceback."""

    def as_error(self) -> UserError | WorkerFailed:
        """What the launching process raises."""
        if self.mistake:
            return UserError(self.text)
        return WorkerFailed(f"worker of rank {self.rank} failed:\n{self.text.rstrip()}")


def write_failure(folder: Path, rank: int, error: BaseException) -> None:
    """Note the exception that ends this worker; to be called where it is handled."""
    mistake = isinstance(error, UserError)
    text = str(error) if mistake else traceback.format_exc()
    write_text(folder / f"{rank}.json", json.dumps(asdict(Failure(time.time(), rank, mistake, text))))


def first_failure(folder: Path) -> Failure | None:
    """The earliest noted failure."""
    found = [Failure(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    return min(found, key=lambda failure: failure.time, default=None)


def killed(rank: int, exit_code: int) -> WorkerFailed:
    """A worker that ended without a word.

    Args:
        exit_code: of the process; below 0 the number of the signal that killed it.
    """
    if exit_code >= 0:
        return WorkerFailed(f"worker of rank {rank} ended with exit code {exit_code} and said nothing")
    name = signal.Signals(-exit_code).name
    hint = " (where memory runs out, the system kills like this)" if name == "SIGKILL" else ""
    return WorkerFailed(f"worker of rank {rank} was killed by {name}{hint}")


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
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOP = "stop"
_PAUSE = 0.2  # seconds


class PassOn:
    """Hands the launching process's signals to its workers.

    Signals are held back (blocked) while workers run and fetched by a thread: new processes inherit that, so that
    Ctrl-C, which reaches a terminal's every process, does not break them off in the middle of their imports.
    """

    def __init__(self, folder: Path) -> None:
        self.signum: int | None = None
        """The first signal that came, if one did."""
        self._folder = folder
        self._over = threading.Event()
        self._others = set(multiprocessing.active_children())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside; in another thread than the main one Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A library's thread that was there before takes signals still: for these.
        before = {signum: signal.signal(signum, self._receive) for signum in _SIGNALS}
        # Python's first process of its own would be started in between, and that lets signals through again.
        resource_tracker.ensure_running()
        fetching = threading.Thread(target=self._fetch, daemon=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS) if _can_fetch() else None
        if mask is not None:
            fetching.start()
        try:
            yield
        finally:
            if mask is not None:
                self._over.set()
                fetching.join()
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _fetch(self) -> None:
        while not self._over.is_set():
            if sys.platform == "linux":
                came = signal.sigtimedwait(_SIGNALS, _PAUSE)
                if came is not None:
                    self._receive(came.si_signo)

    def _receive(self, signum: int, _: FrameType | None = None) -> None:
        if self.signum is not None:
            for child in set(multiprocessing.active_children()) - self._others:
                child.kill()  # whether it has got as far as to be known here or not
            return
        self.signum = signum
        (self._folder / _STOP).touch()
        for worker in self._folder.glob("*.pid"):
            with suppress(ProcessLookupError):
                os.kill(int(worker.stem), signal.SIGINT)


def take_signals(folder: Path) -> None:
    """In a worker: SIGINT asks to stop, SIGTERM ends at once, and both come from the launching process alone.

    Raises:
        KeyboardInterrupt: the word to stop was there before.
    """
    with suppress(PermissionError):  # the leader of a session cannot, and has its own group already
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (folder / f"{os.getpid()}.pid").touch()
    if (folder / _STOP).exists():
        raise KeyboardInterrupt
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _can_fetch() -> bool:
    return hasattr(signal, "sigtimedwait")


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
            from torch import distributed

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
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=patience)  # also beside GPUs: nothing but meetings
    with group_left_at_exit():
        yield Team(distributed.get_rank(), distributed.get_world_size())


SPAWNED = "MIXLORA_SPAWNED"
"""Set in processes that `run_workers` started: there SIGINT asks to stop, SIGTERM ends at once."""
_PR_SET_PDEATHSIG = 1
_SECONDS_FOR_OTHERS = 0.5


@dataclass(frozen=True)
class Exited:
    """The function left through `SystemExit`, as it does when it was asked to stop."""

    code: int


def resolve(function: str) -> Callable[[Any], Any]:
    """The function that `module:name` names."""
    module, _, name = function.partition(":")
    found: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return found


def work(function: str, config: Any, folder: Path) -> Any:
    """Run `function(config)` as one of several; the entry point that torch's launcher gets.

    Returns:
        Its result, or `Exited`: every worker has to get here before the launcher lets any of them go.

    Raises:
        Exception: what the function raised, after it was noted in `folder`.
    """
    _die_with_the_launcher()
    settle_in()
    os.environ[SPAWNED] = "1"
    try:
        take_signals(folder)
        return resolve(function)(config)
    except SystemExit as stop:
        return Exited(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except KeyboardInterrupt:
        # torch would take this for a success without a result, and wait for that for ever.
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        write_failure(folder, global_rank(), error)
        if not isinstance(error, UserError):
            # Another worker may have been killed, of which this is the consequence: the launcher must notice it first.
            time.sleep(_SECONDS_FOR_OTHERS)
        raise


def _die_with_the_launcher() -> None:
    """Let the kernel end this process when the launching one is gone, however it went (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from mixlora_cli.config import EvalConfig, InterferenceConfig, LaunchConfig, TrainConfig

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
