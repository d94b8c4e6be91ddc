"""What a person sees while training: a bar in a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixlora_cli.training.metrics import Throughput


class ProgressReport(TrainerCallback):
    """Steps, loss, tokens per second and time left; the first process alone speaks."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._throughput = Throughput()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._start_step = 0
        self._start_time = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Draw the bar, at the step that the run resumes from."""
        self._start_step, self._start_time = state.global_step, time.perf_counter()
        self._throughput.start(state.num_input_tokens_seen)
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task(
            "train", total=state.max_steps, completed=state.global_step, status=""
        )
        self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the loss of the last `log_every` steps."""
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        rate = self._throughput.read(state.num_input_tokens_seen)
        status = f"loss {logs['loss']:.4f}  {rate:,.0f} tokens/s  ETA {self._time_left(state)}"
        if self._bar is not None:
            self._bar.update(self._task, status=status)
        else:
            line = f"step {state.global_step}/{state.max_steps}  {status}  lr {logs['learning_rate']:.2e}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

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

    def _time_left(self, state: TrainerState) -> timedelta:
        done = max(state.global_step - self._start_step, 1)
        seconds = (time.perf_counter() - self._start_time) / done * (state.max_steps - state.global_step)
        return timedelta(seconds=round(seconds))
