"""Commands in several processes, which `launch.nproc` starts with torch's launcher, or torchrun, deepspeed or SLURM.

Nothing heavy is imported here at the top: the command line, and whoever only asks for this process's rank, need it.
"""

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
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil  # type: ignore[import-untyped]  # accelerate needs it too

from mixlora_cli.errors import UserError, WorkerFailed
from mixlora_cli.store import write_json
from mixlora_cli.surroundings import settle_in

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from mixlora_cli.config import EvalConfig, InterferenceConfig, LaunchConfig, TrainConfig

T = TypeVar("T")
SPAWNED = "MIXLORA_SPAWNED"
"""Set in processes that `run_workers` started: there SIGINT asks to stop, SIGTERM ends at once."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_RANK_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_PR_SET_PDEATHSIG = 1
_PAUSE = 0.2  # seconds
_SECONDS_FOR_OTHERS = 0.5
_PATIENCE = timedelta(days=7)
"""The first to finish waits for the last; a process that died is noticed by whoever started them."""


def train(config: TrainConfig) -> Any:
    """`mixlora train`, in the processes that `launch` asks for. DeepSpeed never shares a process with another job."""
    uses_deepspeed = config.deepspeed.config is not None
    return run_workers("mixlora_cli.training.train:train", config, config.launch, own_process=uses_deepspeed)


def evaluate(config: EvalConfig) -> Any:
    """`mixlora eval`, in the processes that `launch` asks for; each answers its share of the instances.

    A server is asked by one.
    """
    launch = replace(config.launch, nproc=1) if config.eval.server else config.launch
    return run_workers("mixlora_cli.evaluation.evaluate:evaluate", config, launch)


def interference(config: InterferenceConfig) -> Any:
    """`mixlora interference`; the processes share the tasks. Figures alone need no second process."""
    function = "mixlora_cli.analysis.interference.run:interference"
    return _resolve(function)(config) if config.draw_only else run_workers(function, config, config.launch)


def run_workers(function: str, config: Any, launch: LaunchConfig, own_process: bool = False) -> Any:
    """Run `function(config)` in as many processes as asked for and return the result of the first one on this node.

    In a process that torchrun, deepspeed or SLURM started as one of several, the function runs right here and joins
    the others. With a single process it runs right here, too.

    Args:
        function: `module:name`; imported only where it runs. In several processes, a `SystemExit` must leave it in all.
        config: its argument; pickled for other processes, as the result is.
        launch: how many processes.
        own_process: start a process of its own even for a single one (for libraries that leave traces in theirs).

    Raises:
        UserError: a user's mistake in any of them, once, whichever came first.
        WorkerFailed: another error there, with rank and traceback.
        SystemExit: the function left through it, or a signal came: 128 + its number.
    """
    cluster = cluster_environment(os.environ)
    if cluster is not None and launch.nnodes == 1:
        with variables(cluster):
            try:
                return _resolve(function)(config)
            except UserError as error:
                raise UserError(f"rank {cluster['RANK']}: {error}") from error
    processes = launch.nproc
    if processes is None:
        import torch

        processes = max(torch.cuda.device_count(), 1)
    if processes == launch.nnodes == 1 and not own_process:
        return _resolve(function)(config)
    return _start(function, config, launch, processes)


def _resolve(function: str) -> Callable[[Any], Any]:
    module, _, name = function.partition(":")
    found: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return found


def _start(function: str, config: Any, launch: LaunchConfig, processes: int) -> Any:
    """Start the processes of this node with torch's elastic launcher, without restarts, and wait for them."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as TorchConfig
    from torch.distributed.launcher.api import elastic_launch

    alone = launch.nnodes == 1
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixlora-")))
        settings = TorchConfig(
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
        threads = os.environ.get("OMP_NUM_THREADS", str(threads_each(processes)))
        stack.enter_context(variables({"OMP_NUM_THREADS": threads}))
        # Torch's launcher logs every failure at length; here it is said once, at the end.
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        signals = stack.enter_context(_passed_on())
        try:
            results = elastic_launch(settings, _work)(function, config, folder)
        except ChildFailedError as error:
            if signals:
                raise SystemExit(128 + signals[0]) from None
            raise _cause(error, folder) from None
    result = results[min(results)]
    if isinstance(result, _Exited):
        raise SystemExit(128 + signals[0] if signals else result.code)
    return result


@contextmanager
def _passed_on() -> Iterator[list[int]]:
    """Hand Ctrl-C and `kill` to the workers started inside: the first asks them to stop, the second ends them at once.

    Signals are held back (blocked) while workers run and fetched by a thread: new processes inherit that, so that
    Ctrl-C, which reaches a terminal's every process, does not break them off in the middle of their imports. What is
    sent to them stays until they are ready (`_take_signals`).

    Returns:
        The signals that have come so far.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came  # Python allows no handlers here
        return
    # Python's first process of its own would be started in between, and that lets signals through again.
    resource_tracker.ensure_running()
    others, asked = {child.pid for child in psutil.Process().children()}, set()
    over = threading.Event()

    def tell() -> None:
        for worker in psutil.Process().children() if came else ():
            if worker.pid not in others and (len(came) > 1 or worker.pid not in asked):
                asked.add(worker.pid)
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGINT if len(came) == 1 else signal.SIGKILL)

    def fetch() -> None:
        while not over.is_set():
            if sys.platform != "linux":
                over.wait(_PAUSE)
            elif (found := signal.sigtimedwait(_SIGNALS, _PAUSE)) is not None:
                came.append(found.si_signo)
            tell()  # also those that have been started since

    # A library's thread that was there before takes signals still: for these.
    before = {signum: signal.signal(signum, lambda signum, _: came.append(signum)) for signum in _SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS if sys.platform == "linux" else ())
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    try:
        yield came
    finally:
        over.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in before.items():
            signal.signal(signum, handler)


@dataclass(frozen=True)
class _Exited:
    """A worker's function left through `SystemExit`, as it does when it was asked to stop."""

    code: int


def _work(function: str, config: Any, folder: Path) -> Any:
    """Run `function(config)` as one of several; the entry point that torch's launcher gets.

    Returns:
        Its result, or `_Exited`: every worker has to get here before the launcher lets any of them go.

    Raises:
        Exception: what the function raised, after it was noted in `folder`.
    """
    _die_with_the_launcher()
    settle_in()
    os.environ[SPAWNED] = "1"
    if sys.platform == "linux":
        # As in a process of torchrun's: what a data loader's workers are given (processors) cannot all be pickled.
        multiprocessing.set_start_method("fork", force=True)
    try:
        with suppress(PermissionError):  # the leader of a session cannot, and has its own group already
            os.setpgid(0, 0)  # a terminal's Ctrl-C comes from the launching process alone
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return _resolve(function)(config)
    except SystemExit as stop:
        return _Exited(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except KeyboardInterrupt:
        # torch would take this for a success without a result, and wait for that for ever.
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        # When one worker fails, the others soon fail too because it is gone. The first failure is the cause, so the
        # times are noted exactly: torch's own error files know whole seconds.
        mistake = isinstance(error, UserError)
        text = str(error) if mistake else traceback.format_exc().rstrip()
        failure = {"time": time.time(), "rank": global_rank(), "mistake": mistake, "text": text}
        write_json(folder / f"{global_rank()}.json", failure)
        if not mistake:
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


def _cause(error: ChildFailedError, folder: Path) -> UserError | WorkerFailed:
    """The failure that came first; what killed a worker from outside comes before what the others noted about it."""
    rank, found = error.get_first_failure()
    code = found.exitcode
    noted = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    # SIGABRT: how a communication library ends its process when another one is gone.
    if noted and (code >= 0 or code == -signal.SIGABRT):
        first = min(noted, key=lambda failure: float(failure["time"]))
        if first["mistake"]:
            return UserError(first["text"])
        return WorkerFailed(f"worker of rank {first['rank']} failed:\n{first['text']}")
    if code >= 0:
        return WorkerFailed(f"worker of rank {rank} ended with exit code {code} and said nothing")
    name = signal.Signals(-code).name
    hint = " (where memory runs out, the system kills like this)" if name == "SIGKILL" else ""
    return WorkerFailed(f"worker of rank {rank} was killed by {name}{hint}")


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
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if int(tasks) <= 1 or "SLURM_PROCID" not in environment:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "localhost"
    job, step = (int(environment.get(key, "0")) for key in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = 20_000 + (job * 31 + step) % 20_000  # all tasks of the step agree on it without speaking
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
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


def threads_each(processes: int) -> int:
    """Processor cores for each of so many processes on this node, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // processes, 1)


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


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that evaluate or measure together.

    Only waiting goes through `torch.distributed`. What they tell one another goes through files in the output folder,
    so with several nodes all must see it.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one speaks, and writes the results."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The others go through the block after the main process, and find in the cache what it has put there."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item: of items sorted by length, all get equally long ones."""
        return list(items[self.rank :: self.size])


@contextmanager
def joined(patience: timedelta = _PATIENCE) -> Iterator[ProcessGroup]:
    """The group that this process was started in, each on the GPU of its local rank; of one process without others."""
    if launched_processes() == 1:
        yield ProcessGroup()
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=patience)  # also beside GPUs: nothing but meetings
    with group_left_at_exit():
        yield ProcessGroup(distributed.get_rank(), distributed.get_world_size())


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
