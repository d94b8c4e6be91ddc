"""`metrics.jsonl`: one line for each logged step, appended while the run goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixlora_cli.store import write_text

ROUTING = "routing/"
"""What the names of the routing's measures begin with in the Trainer's logs."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, in order; none if there is no file. A last line cut short by a kill is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def drop_rows_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut a file of rows with a `step` down to those up to `step`, which are returned; creates an empty file."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


class Throughput:
    """Tokens per second since the last call, from the Trainer's running count of non-padding tokens."""

    def __init__(self) -> None:
        self._tokens = 0
        self._time = 0.0

    def start(self, tokens: int) -> None:
        """Count from here."""
        self._tokens, self._time = tokens, time.perf_counter()

    def read(self, tokens: int) -> float:
        """Tokens per second since `start` or the last `read`."""
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._tokens, self._time = tokens, now
        return rate


class MetricsWriter(TrainerCallback):
    """Appends {step, epoch, loss, loss_steps, lr, grad_norm, tokens_per_second, tokens, seconds}.

    `loss` is the mean over the last `loss_steps` steps: rows come every `log_every` steps, and in between where
    something else wants one. `seconds` adds up over resumes.
    Where there is such a thing, also `balance_loss`, and `routing` with what the Trainer's log calls "routing/...".
    On resume, rows after the resumed step are dropped: the steps are done again and written again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._throughput = Throughput()
        self._seconds_before = 0.0
        self._start = 0.0
        self._last_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drop rows that lie after the step the run starts from."""
        # A resumed state brings the intervals of the earlier call along; this call's are the ones asked for.
        state.compute_steps(args, state.max_steps)
        self._start = time.perf_counter()
        self._last_step = state.global_step
        self._throughput.start(state.num_input_tokens_seen)
        if not state.is_world_process_zero:
            return
        kept = drop_rows_after(self.path, state.global_step)
        self._seconds_before = kept[-1]["seconds"] if kept else 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The last step is always logged, also between two multiples of `log_every`."""
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
        """Write a row for a logged step; the Trainer's closing summary has no loss of its own and is passed over."""
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        row: dict[str, Any] = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 6),
            "loss": logs["loss"],
            "loss_steps": state.global_step - self._last_step,
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round(self._throughput.read(state.num_input_tokens_seen), 1),
            "tokens": state.num_input_tokens_seen,
            "seconds": round(self._seconds_before + time.perf_counter() - self._start, 3),
        }
        self._last_step = state.global_step
        if "balance_loss" in logs:
            row["balance_loss"] = logs["balance_loss"]
        routing = {key.removeprefix(ROUTING): value for key, value in logs.items() if key.startswith(ROUTING)}
        if routing:
            row["routing"] = routing
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
