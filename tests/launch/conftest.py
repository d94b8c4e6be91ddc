"""Functions for workers that load nothing but what they need, and a program that starts them."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mixlora_cli

SOURCE = Path(mixlora_cli.__file__).parents[1]

FUNCTIONS = '''
import os, signal, sys, time
from pathlib import Path

def rank(): return int(os.environ["RANK"])

def meet():
    """Wait until both processes are here."""
    import torch.distributed as dist
    dist.init_process_group("gloo")
    dist.barrier()

def greet(word):
    return word, rank(), os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]

def plain(word): return word, os.getpid()

def mistake(folder):
    from mixlora_cli.errors import UserError
    if rank() == 1:
        raise UserError("no such thing; give another")
    time.sleep(100)

def bug(folder):
    import torch, torch.distributed as dist
    meet()
    if rank() == 1:
        raise ValueError("a mistake of ours")
    dist.all_reduce(torch.ones(1))

def killed(folder):
    import torch, torch.distributed as dist
    meet()
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))

def finish_when_asked(folder):
    """Says that it is ready; asked to stop, takes a second to do so."""
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(1))
    Path(folder, f"ready-{os.getpid()}").touch()
    while not asked:
        time.sleep(0.05)
    time.sleep(1)
    Path(folder, f"saved-{rank()}").touch()
    sys.exit(130)

def never_stop(folder):
    signal.signal(signal.SIGINT, lambda *_: None)
    Path(folder, f"ready-{os.getpid()}").touch()
    time.sleep(100)
'''

LAST_WORD = """
import atexit
from torch import distributed

# What is registered first is called last. One write: processes that share an output would mix the parts of several.
atexit.register(lambda: print(f"in a group at the end: {distributed.is_initialized()}\\n", end="", flush=True))
"""
"""The beginning of a program that says at its very end whether it is still in a group."""
PROGRAM = """
import sys
from mixlora_cli.config import LaunchConfig
from mixlora_cli.launch import run_workers
run_workers(sys.argv[1], sys.argv[2], LaunchConfig(nproc=2))
"""


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers can import `launched`; no process of a cluster started this test."""
    (tmp_path / "launched.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for key in list(os.environ):
        if key.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "OMP_NUM_THREADS")):
            monkeypatch.delenv(key)


class Started:
    """A program with two workers, in a process group of its own, as a shell would start it."""

    def __init__(self, function: str, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), f"launched:{function}", str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(SOURCE)])},
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )

    def workers(self) -> list[int]:
        """Process ids of both workers, once they are ready."""
        wait_for(lambda: len(list(self.folder.glob("ready-*"))) == 2)
        return [int(path.name.removeprefix("ready-")) for path in self.folder.glob("ready-*")]

    def children(self) -> list[int]:
        """All processes that the program has started, ready or not (Linux)."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def end(self) -> tuple[int, str]:
        """Exit code and standard error."""
        _, err = self.process.communicate(timeout=300)
        return self.process.returncode, err


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be collected does not (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Started]]:
    """`start("function")`; whatever is left of it is killed after the test."""
    started = []

    def begin(function: str) -> Started:
        started.append(Started(function, tmp_path))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()
