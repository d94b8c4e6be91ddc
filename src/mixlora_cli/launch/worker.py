"""What runs in each process that `run_workers` starts: the function itself, and care for how it ends."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora_cli.errors import UserError
from mixlora_cli.launch.environment import global_rank
from mixlora_cli.launch.failures import write_failure
from mixlora_cli.launch.signals import take_signals
from mixlora_cli.surroundings import settle_in

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
