"""Ctrl-C, `kill` and SIGKILL while workers run: they finish what they do, or end at once, and none is left."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import is_alive, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_workers_finish_before_the_launcher_ends(start: Any, signum: int) -> None:
    program = start("finish_when_asked")
    workers = program.workers()
    # Ctrl-C reaches every process of the terminal, `kill` the launching one alone.
    (os.killpg if signum == signal.SIGINT else os.kill)(program.process.pid, signum)
    assert program.end() == (128 + signum, "")
    assert {path.name for path in program.folder.glob("saved-*")} == {"saved-0", "saved-1"}
    assert not any(map(is_alive, workers))


def test_second_signal_ends_them_at_once(start: Any) -> None:
    program = start("never_stop")
    workers = program.workers()
    os.kill(program.process.pid, signal.SIGINT)
    wait_for(lambda: signal_seen(program))
    os.kill(program.process.pid, signal.SIGTERM)
    assert program.end() == (130, "")
    assert not any(map(is_alive, workers))


def signal_seen(program: Any) -> bool:
    """The first signal has left the queue of the launching process."""
    lines = Path(f"/proc/{program.process.pid}/status").read_text().splitlines()
    return all(int(line.split()[1], 16) == 0 for line in lines if line.startswith(("SigPnd", "ShdPnd")))


def test_ctrl_c_while_workers_are_starting_is_quiet(start: Any) -> None:
    program = start("finish_when_asked")
    wait_for(lambda: len(program.children()) >= 3)  # Python's resource tracker is the first
    children = program.children()
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.end() == (130, "")
    wait_for(lambda: not any(map(is_alive, children)), 60)
    assert list(program.folder.glob("saved-*")) == []


def test_workers_die_with_a_launcher_that_is_killed(start: Any) -> None:
    program = start("never_stop")
    workers = program.workers()
    os.kill(program.process.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, workers)), 20)
