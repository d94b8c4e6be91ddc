"""What happens beside the Trainer's steps: metrics and progress are written, and signals stop the run in good order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixlora_cli.launch import SPAWNED, global_rank
from mixlora_cli.progress import say
from mixlora_cli.training.run_folder import append_row, drop_rows_after

ROUTING = "routing/"
"""What the names of the routing's measures begin with in the Trainer's logs."""


class Report(TrainerCallback):
    """Writes `metrics.jsonl`, and shows a bar on a terminal or plain lines elsewhere; the first process alone does.

    A row has {step, epoch, loss, loss_steps, lr, grad_norm, tokens_per_second, tokens, seconds}, and where there is
    such a thing `balance_loss`, and `routing` with what the Trainer's log calls "routing/...". `loss` is the mean over
    the last `loss_steps` steps: rows come every `log_every` steps, and in between where something else wants one.
    `seconds` adds up over resumes. On resume, rows after the resumed step are dropped: the steps are done again.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self.path = path
        self.console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._seconds_before = self._start = self._last_time = 0.0
        self._start_step = self._last_step = self._last_tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drop rows that lie after the step the run starts from, and draw the bar there."""
        # A resumed state brings the intervals of the earlier call along; this call's are the ones asked for.
        state.compute_steps(args, state.max_steps)
        self._start = self._last_time = time.perf_counter()
        self._start_step = self._last_step = state.global_step
        self._last_tokens = state.num_input_tokens_seen
        if not state.is_world_process_zero:
            return
        kept = drop_rows_after(self.path, state.global_step)
        self._seconds_before = kept[-1]["seconds"] if kept else 0.0
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
            self._bar = Progress(TextColumn("train"), *columns, TimeElapsedColumn(), console=self.console)
            self._task = self._bar.add_task(
                "train", total=state.max_steps, completed=state.global_step, status=""
            )
            self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar. The last step is always logged, also between two multiples of `log_every`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write and show a logged step; the Trainer's closing summary has no loss of its own and is passed over."""
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        now = time.perf_counter()
        rate = (state.num_input_tokens_seen - self._last_tokens) / max(now - self._last_time, 1e-9)
        row: dict[str, Any] = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 6),
            "loss": logs["loss"],
            "loss_steps": state.global_step - self._last_step,
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round(rate, 1),
            "tokens": state.num_input_tokens_seen,
            "seconds": round(self._seconds_before + now - self._start, 3),
        }
        if "balance_loss" in logs:
            row["balance_loss"] = logs["balance_loss"]
        routing = {key.removeprefix(ROUTING): value for key, value in logs.items() if key.startswith(ROUTING)}
        if routing:
            row["routing"] = routing
        append_row(self.path, row)
        self._last_time, self._last_step = now, state.global_step
        self._last_tokens = state.num_input_tokens_seen

        pace = (now - self._start) / max(state.global_step - self._start_step, 1)
        left = timedelta(seconds=round(pace * (state.max_steps - state.global_step)))
        status = f"loss {logs['loss']:.4f}  {rate:,.0f} tokens/s  ETA {left}"
        if self._bar is not None:
            self._bar.update(self._task, status=status)
        else:
            line = f"step {state.global_step}/{state.max_steps}  {status}  lr {logs['learning_rate']:.2e}"
            say(line, self.console)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave the finished bar on the screen."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; also after an error, when `on_train_end` was never called."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Interrupted(SystemExit):
    """The run stopped at a signal after saving a checkpoint; exit code 128 + signal number (130, 143)."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class StopAtSignal(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into "save and stop" at the end of the step that is running.

    A second signal ends the process at once. Of several processes, all stop after the same step as soon as one of
    them has got a signal.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that came, if one did."""
        self.stopped: int | None = None
        """The signal that stopped the run; None when its last step was done anyway."""
        # A worker of ours is asked to stop by SIGINT alone; by SIGTERM torch's launcher ends it when another failed.
        self._signals = (signal.SIGINT,) if SPAWNED in os.environ else (signal.SIGINT, signal.SIGTERM)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside; in another thread than the main one Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._receive) for signum in self._signals}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _receive(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        # From here on the kernel ends the process itself, also while Python is inside a long matrix product.
        for each in self._signals:
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


def _agreed(signum: int | None, device: torch.device) -> int | None:
    """The signal that any of the processes has got; every one of them has to ask after every step."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return signum
    flag = torch.tensor(signum or 0, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag) or None
