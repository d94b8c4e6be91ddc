"""Commands in processes of their own: output in a log, Ctrl-C handed on to them, their cells locked while they run."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

PROGRAM = (sys.executable, "-m", "mixlora_cli.cli")
"""What `mixlora` is, whichever environment this runs in."""
LOOK_EVERY = 0.5  # seconds between two looks at what the process does
_TAIL = 4096  # bytes


class StopRequest:
    """Set by the first Ctrl-C (or SIGTERM), which running processes get as well; the second ends them at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._children: set[subprocess.Popen[bytes]] = set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside; in another thread than the main one Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self._receive) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _receive(self, signum: int, _: FrameType | None) -> None:
        self.ask()

    def ask(self) -> None:
        """What a signal does: processes are asked to stop, the second time they are ended."""
        again, self.wanted = self.wanted, True
        for child in tuple(self._children):
            if child.poll() is None:
                self._end(child, again)

    @staticmethod
    def _end(child: subprocess.Popen[bytes], at_once: bool) -> None:
        if not at_once:
            child.send_signal(signal.SIGINT)
            return
        with suppress(ProcessLookupError):  # it may have ended by itself this very moment
            os.killpg(child.pid, signal.SIGKILL)

    def run(self, child: subprocess.Popen[bytes], look: Callable[[], None]) -> int:
        """Wait for the process, looking at it now and then; returns its exit code, negative for a signal.

        Several threads may wait for one each.
        """
        self._children.add(child)
        try:
            if self.wanted:  # the signal came while the process was being started
                self._end(child, at_once=False)
            while True:
                try:
                    return child.wait(LOOK_EVERY)
                except subprocess.TimeoutExpired:
                    look()
        except BaseException:
            self._end(child, at_once=True)  # nobody would wait for it any more
            raise
        finally:
            self._children.discard(child)


def run_logged(
    program: Sequence[str],
    arguments: Sequence[str],
    log: Path,
    lock: IO[str],
    stop: StopRequest,
    look: Callable[[], None],
    variables: Mapping[str, str],
) -> int:
    """Run `program arguments`, append what it prints to `log`, return its exit code; `variables` join its environment.

    A session of its own: a Ctrl-C of the terminal reaches it once, through `stop`, and not twice, which would end it
    without a checkpoint. It holds the lock as well, should this process be killed.
    """
    with log.open("ab") as output:
        output.write(f"$ mixlora {shlex.join(arguments)}\n".encode())
        output.flush()
        with subprocess.Popen(
            [*program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
            env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
        ) as child:
            return stop.run(child, look)


@contextmanager
def locked(folder: Path) -> Iterator[IO[str] | None]:
    """Hold the lock of a cell; None while another `mixlora reproduce`, or a process that one left behind, holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def last_line(log: Path) -> str:
    """The last line that says something, for a person who wants to know why; "" without one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
