"""Ctrl-C and `kill`: the current step is finished and saved, then the run stops; a second signal ends it at once.

Of several processes, all stop after the same step as soon as one of them has got a signal.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixlora_cli.launch.environment import global_rank
from mixlora_cli.launch.worker import SPAWNED


class Interrupted(SystemExit):
    """The run stopped at a signal after saving a checkpoint; exit code 128 + signal number (130, 143)."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class StopAtSignal(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into "save and stop" at the end of the step that is running."""

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that came, if one did."""
        self.stopped: int | None = None
        """The signal that stopped the run; None when its last step was done anyway."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside; in another thread than the main one Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._receive) for signum in _signals()}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _receive(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        # From here on the kernel ends the process itself, also while Python is inside a long matrix product.
        for each in _signals():
            signal.signal(each, signal.SIG_DFL)
        if global_rank() != 0:
            return
        name = signal.Signals(signum).name
        # Not through Python's buffered streams: the signal may have come in the middle of a write to them.
        os.write(
            2, f"\n{name}: finishing this step and saving a checkpoint; once more ends at once\n".encode()
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask the Trainer to save and stop; a run that has just done its last step simply ends."""
        signum = _agreed(self.signum, args.device)
        if signum is not None and state.global_step < state.max_steps:
            self.stopped = signum
            control.should_log = True  # else the losses since the last log would appear nowhere
            control.should_save = True
            control.should_training_stop = True


def _signals() -> tuple[signal.Signals, ...]:
    """A worker of ours is asked to stop by SIGINT alone; by SIGTERM torch's launcher ends it when another failed."""
    return (signal.SIGINT,) if SPAWNED in os.environ else (signal.SIGINT, signal.SIGTERM)


def _agreed(signum: int | None, device: torch.device) -> int | None:
    """The signal that any of the processes has got; every one of them has to ask after every step."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return signum
    flag = torch.tensor(signum or 0, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag) or None
