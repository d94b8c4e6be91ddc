"""Requests to batches: a bounded queue, and one thread in which the models answer.

Requests for one model that wait together are answered in one padded batch, each decoded in its own way and with its own
factors. A batch runs to its end before the next begins; a row that has ended, was cancelled or took too long adds
nothing to it any more.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from mixlora_cli.config import LimitsConfig
from mixlora_cli.models.generate import Answer, Decoding, Factors
from mixlora_cli.serving.models import Question, ServedModel

BATCH_PIXELS = 100_000_000
"""A batch takes no further request beyond these: 300 MB, decoded all at once."""
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class QueueFull(Exception):
    """Raised where no further request may wait."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"{retry_after}")
        self.retry_after = retry_after
        """Seconds after which there should be room."""


class Stopping(Exception):
    """Raised where the server ends: it takes no further request, or gave this one up."""


class TimedOut(Exception):
    """Raised where a request took longer than it may."""


@dataclass(eq=False)
class Job:
    """One request on its way through the engine, and who is told of it. Both are called in the engine's thread."""

    model: ServedModel
    question: Question
    decoding: Decoding
    on_text: Callable[[str, Factors | None], None]
    """Gets what is new of the text, at every token, and the factors of the prompt."""
    on_end: Callable[[Answer | Exception], None]
    pixels: int = 0
    """Of its pictures together."""
    begun: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    """Nobody waits for the answer any more."""
    is_heard: bool = False
    """`on_text` has been called."""


class Metrics:
    """What `/metrics` tells, in Prometheus' names and units."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        shared: dict[str, Any] = {"namespace": "mixlora", "registry": self.registry}
        self.requests = Counter(
            "requests", "Requests by model and HTTP status.", ["model", "status"], **shared
        )
        self.tokens = Counter(
            "tokens", "Tokens by model: of prompts, of answers.", ["model", "kind"], **shared
        )
        self.seconds = Histogram(
            "request_seconds",
            "From a request to the end of its answer.",
            ["model"],
            buckets=_SECONDS,
            **shared,
        )
        self.first = Histogram(
            "first_token_seconds", "From a request to its first token.", ["model"], buckets=_SECONDS, **shared
        )
        self.batches = Histogram(
            "batch_size", "Requests answered together.", buckets=(1, 2, 4, 8, 16, 32, 64), **shared
        )
        self.waiting = Gauge("requests_waiting", "Requests in the queue.", **shared)
        self.running = Gauge("requests_running", "Requests being answered.", **shared)


class Engine:
    """Answers jobs in a thread of its own, in the order in which they came."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits, self.metrics = limits, Metrics()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._state: Literal["open", "stopping", "closed"] = "open"
        self._pace = 1.0  # seconds of a batch, a moving mean
        self.metrics.waiting.set_function(lambda: len(self._waiting))
        self.metrics.running.set_function(lambda: len(self._running))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether it takes jobs."""
        return self._state == "open" and self._thread.is_alive()

    @property
    def load(self) -> dict[str, int]:
        """Requests that wait, and that are being answered."""
        return {"waiting": len(self._waiting), "running": len(self._running)}

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            QueueFull: too many wait already.
            Stopping: the engine takes none any more.
        """
        with self._changed:
            if not self.is_open:
                raise Stopping
            if len(self._waiting) >= self._limits.queue:
                turns = len(self._waiting) / self._limits.batch_size
                raise QueueFull(max(1, round(turns * self._pace)))
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: it leaves the queue, or its batch at the next token."""
        with self._changed:
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._changed.notify_all()

    def stop_taking(self) -> None:
        """Take no further job; those that were taken go on."""
        with self._changed:
            if self._state == "open":
                self._state = "stopping"
            self._changed.notify_all()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until no job waits or runs; whether that was so in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._running, seconds)

    def close(self) -> None:
        """Give up what is left, and end the thread."""
        with self._changed:
            self._state = "closed"
            left = [*self._waiting, *self._running]
            self._waiting.clear()
            self._changed.notify_all()
        for job in left:
            job.is_cancelled = True
            job.on_end(Stopping())
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            started = time.monotonic()
            self.metrics.batches.observe(len(batch))
            self._answer(batch)
            self._pace += 0.2 * (time.monotonic() - started - self._pace)
            with self._changed:
                self._running = []
                self._changed.notify_all()

    def _next_batch(self) -> list[Job]:
        """Wait for jobs, and a moment longer for others; those of the oldest one's model. None when closed."""
        limits = self._limits

        def is_closed() -> bool:
            return self._state == "closed"

        with self._changed:
            while not self._running and not is_closed():
                self._changed.wait_for(lambda: self._waiting or is_closed())
                self._changed.wait_for(
                    lambda: len(self._waiting) >= limits.batch_size or is_closed(), limits.gather
                )
                self._running = [] if is_closed() else self._first_together()
            return self._running

    def _first_together(self) -> list[Job]:
        """Take what is answered together out of the queue; nothing where all that waited has gone."""
        batch: list[Job] = []
        pixels = 0
        for job in [job for job in self._waiting if job.model is self._waiting[0].model]:
            pixels += job.pixels
            if len(batch) == self._limits.batch_size or (batch and pixels > BATCH_PIXELS):
                break
            batch.append(job)
        for job in batch:
            self._waiting.remove(job)
        return batch

    def _answer(self, batch: Sequence[Job]) -> None:
        """Answer a batch. Where it fails, its halves are tried, down to the one job at which it does."""
        jobs = [job for job in batch if not self._is_over(job)]
        if not jobs:
            return

        def watch(row: int, piece: str, factors: Factors | None) -> bool:
            job = jobs[row]
            if self._is_over(job):
                return False
            if not job.is_heard:
                job.is_heard = True
                self.metrics.first.labels(job.model.name).observe(time.monotonic() - job.begun)
            job.on_text(piece, factors)
            return True

        try:
            answers = jobs[0].model.write(
                [job.question for job in jobs],
                [job.decoding for job in jobs],
                watch,
                self._limits.exact,
            )
        except Exception as error:
            silent = [job for job in jobs if not job.is_heard]
            if len(jobs) > 1 and silent:
                self._answer(silent[: len(silent) // 2])
                self._answer(silent[len(silent) // 2 :])
                failed = [job for job in jobs if job not in silent]
            else:
                failed = jobs
            if failed:
                traceback.print_exception(error)
            for job in failed:
                self._end(job, error)
            return
        for job, answer in zip(jobs, answers, strict=True):
            self._end(job, answer)

    def _is_over(self, job: Job) -> bool:
        """Whether nobody waits for a job any more; one that took too long is told."""
        if not job.is_cancelled and time.monotonic() - job.begun > self._limits.timeout:
            job.is_cancelled = True
            job.on_end(TimedOut())
        return job.is_cancelled

    def _end(self, job: Job, outcome: Answer | Exception) -> None:
        name = job.model.name
        if isinstance(outcome, Answer):
            self.metrics.tokens.labels(name, "prompt").inc(job.question.item.length)
            self.metrics.tokens.labels(name, "answer").inc(outcome.num_tokens)
            self.metrics.seconds.labels(name).observe(time.monotonic() - job.begun)
        if not job.is_cancelled:
            job.on_end(outcome)
