"""Ctrl-C and `kill` while workers run: they are asked to stop and waited for; a second signal ends them at once.

Workers are known by a file with their process id as its name. One that is still starting finds the word to stop when
it gets there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

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
