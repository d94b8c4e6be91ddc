"""Go through a grid in processes: what is there stays, what was interrupted resumes, what fails is noted; its view."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mixlora_cli.launch import threads_each
from mixlora_cli.progress import say
from mixlora_cli.reproduce.jobs import Job, Step
from mixlora_cli.training.run_folder import read_metrics

PROGRAM = (sys.executable, "-m", "mixlora_cli.cli")
"""What `mixlora` is, whichever environment this runs in."""
LOOK_EVERY = 0.5  # seconds between two looks at what a process does
_TAIL = 4096  # bytes of a log in which its last line is looked for
_DETAIL = 70  # characters of a log's line


@dataclass(frozen=True)
class Failure:
    """A step that did not end well."""

    job: Job
    step: Step
    log: Path
    reason: str


@dataclass
class Outcome:
    """What became of the grid."""

    done: list[Job] = field(default_factory=list)
    """Complete now, whether they were run or there already."""
    failed: list[Failure] = field(default_factory=list)
    elsewhere: list[Job] = field(default_factory=list)
    """Left to another process that is at work on them."""
    stopped: bool = False


class Runner:
    """Runs jobs in their order, `at_once` of them at a time, each step in a process of its own."""

    def __init__(
        self,
        view: GridView,
        stop: StopRequest,
        program: Sequence[str] = PROGRAM,
        keep_checkpoints: bool = False,
        at_once: int = 1,
    ) -> None:
        self._view = view
        self._stop = stop
        self._program = program
        self._keep_checkpoints = keep_checkpoints
        self._at_once = at_once
        self._outcome = Outcome()
        self._ended: dict[Path, Future[None]] = {}

    def run(self, jobs: Sequence[Job]) -> Outcome:
        """Do what is missing of every job. One whose files cannot be written has failed; the others go on."""
        with ThreadPoolExecutor(self._at_once) as pool:
            for job in jobs:
                self._ended[job.folder] = pool.submit(self._take, job)
            ended, _ = wait(self._ended.values(), return_when=FIRST_EXCEPTION)
            if any(each.exception() for each in ended):
                self._stop.ask()  # a mistake of ours: end the others, so that it is seen now and not in hours
        for each in self._ended.values():
            each.result()
        for found in (self._outcome.done, self._outcome.elsewhere):
            found.sort(key=jobs.index)
        self._outcome.failed.sort(key=lambda failure: jobs.index(failure.job))
        self._outcome.stopped = self._stop.wanted
        return self._outcome

    def _take(self, job: Job) -> None:
        if job.after in self._ended:  # it comes earlier in the order, so it has been started
            self._ended[job.after].exception()
        if self._stop.wanted:
            return
        with locked(job.folder) as lock:
            if lock is None:
                self._outcome.elsewhere.append(job)
                self._view.change(job, "elsewhere", f"another process is at work in {job.folder}")
            else:
                self._do(job, lock)

    def _do(self, job: Job, lock: IO[str]) -> None:
        missing = job.missing()
        for step in job.steps:
            if step not in missing:
                self._view.skip(step)
        if not missing:
            job.note(when=time.time())
            self._outcome.done.append(job)
            self._view.change(job, "there")
            return
        took = 0.0
        for step in missing:
            self._view.change(job, "running", step.name)
            self._view.start(step)
            try:
                reason = self._run_step(job, step, lock)
            except OSError as error:
                reason = f"{error.filename or job.folder}: {error.strerror or error}"
            took += self._view.finish(step, succeeded=reason is None)
            if reason is not None:
                self._note_failure(job, step, reason)
                return
        self._outcome.done.append(job)
        self._view.change(job, "done", f"in {in_words(took)}")

    def _run_step(self, job: Job, step: Step, lock: IO[str]) -> str | None:
        """Run one command, its output appended to a log; why it did not end well, or None.

        In a session of its own: a Ctrl-C of the terminal reaches it once, through the stop request, and not twice,
        which would end it without a checkpoint. It holds the lock as well, should this process be killed.
        """
        job.begin(step, when=time.time())
        log, start = _log(job, step), time.monotonic()
        with log.open("ab") as output:
            output.write(f"$ mixlora {shlex.join(step.arguments)}\n".encode())
            output.flush()
            with subprocess.Popen(
                [*self._program, *step.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self._share()},
            ) as child:
                code = self._stop.run(child, lambda: self._view.look(job, _progress(job, step)))
        if code != 0:
            ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            return f"{ended}: {last_line(log)[:300]}"
        if not job.has(step):
            return f"exit code 0, but {step.result} is not there or not what was asked for"
        job.note(step, seconds=round(time.monotonic() - start, 1))
        if step.name == "train" and not self._keep_checkpoints:  # gigabytes, where all weights are trained
            shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
        return None

    def _share(self) -> dict[str, str]:
        """Threads for each of several processes; a lone one, or a user who says how many, is left alone."""
        if self._at_once == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(threads_each(self._at_once))}

    def _note_failure(self, job: Job, step: Step, reason: str) -> None:
        if self._stop.wanted:
            self._view.change(job, "stopped", f"in {step.name}")
            return
        log = _log(job, step)
        self._outcome.failed.append(Failure(job, step, log, reason))
        self._view.change(job, "failed", f"{step.name}, {reason}; log: {log}")


def _log(job: Job, step: Step) -> Path:
    return job.folder / f"{step.name}.log"


def _progress(job: Job, step: Step) -> str:
    """Step and loss of a training; of other commands what they said last."""
    if step.name == "train" and (rows := read_metrics(job.folder / "metrics.jsonl")):
        of = f"/{step.about['steps']}" if step.about.get("steps") else ""
        return f"train, step {rows[-1]['step']}{of}, loss {rows[-1]['loss']:.3f}"
    return f"{step.name}: {last_line(_log(job, step))[:_DETAIL]}"


def last_line(log: Path) -> str:
    """The last line that says something, for a person who wants to know why; "" without one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


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
        """Wait for the process, looking at it now and then; its exit code, negative for a signal.

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


State = Literal["waiting", "running", "there", "done", "failed", "stopped", "elsewhere"]
_STYLES: dict[State, str] = {
    "running": "bold cyan",
    "there": "green",
    "done": "green",
    "failed": "bold red",
    "stopped": "yellow",
    "elsewhere": "yellow",
}
_BESIDE = len("elsewhere") + 8  # characters of a line that are neither title nor detail
_AROUND = 8  # lines of a terminal that are not the grid's rows


@dataclass
class Line:
    """One job's line."""

    job: Job
    state: State = "waiting"
    detail: str = ""


class GridView:
    """The grid as it stands: a live table in a terminal, a line for each change in a file or a pipe.

    It also keeps what steps took, from which the time left follows.
    """

    def __init__(self, jobs: Sequence[Job], console: Console, at_once: int = 1) -> None:
        """`at_once`: how many jobs run at a time, each on its share of the machine."""
        self.lines = {job.folder: Line(job) for job in jobs}
        self._console = console
        self._at_once = at_once
        self._took: list[tuple[float | None, float]] = []
        self._started: dict[Path, float] = {}
        self._left = {step.result: step.seconds for job in jobs for step in job.steps}
        is_live = console.is_terminal
        self._live = (
            Live(get_renderable=self.render, console=console, refresh_per_second=2) if is_live else None
        )

    def __enter__(self) -> GridView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()

    def change(self, job: Job, state: State, detail: str = "") -> None:
        """A job's state is another now."""
        line = self.lines[job.folder]
        line.state, line.detail = state, detail
        if state not in ("waiting", "running"):
            for step in job.steps:
                self.skip(step)
        if self._live is None:
            place = list(self.lines).index(job.folder) + 1
            text = f"[{place}/{len(self.lines)}] {job.title}: {state}{f', {detail}' if detail else ''}"
            say(f"{text}  ({self._left_in_words()})" if state in ("running", "done") else text, self._console)

    def look(self, job: Job, detail: str) -> None:
        """How a running job gets on; seen in a terminal alone."""
        self.lines[job.folder].detail = detail

    def start(self, step: Step) -> None:
        """The step's time begins."""
        self._started[step.result] = time.monotonic()

    def finish(self, step: Step, succeeded: bool) -> float:
        """The step's time ends; how long it took, in seconds."""
        took = time.monotonic() - self._started.pop(step.result)
        self.skip(step)
        if succeeded:  # of the whole machine, as the estimates are
            self._took.append((step.seconds, took / self._at_once))
        return took

    def skip(self, step: Step) -> None:
        """Nothing is left to do of the step."""
        self._left.pop(step.result, None)

    def time_left(self) -> float | None:
        """Seconds until the last job is done: what all together take the machine, or what the longest takes."""
        jobs = [line.job.steps for line in self.lines.values()]
        found = [self._machine_time(step for steps in jobs for step in steps)]
        alone = [self._machine_time(steps) for steps in jobs]
        found += [None if each is None else self._at_once * each for each in alone]
        known = [each for each in found if each is not None]
        return None if len(known) < len(found) else max(0.0, *known)

    def _machine_time(self, steps: Iterable[Step]) -> float | None:
        """Seconds of the whole machine that are still needed for these steps; those that run had some already."""
        # As they are now: other threads change them.
        open_steps, started = dict(self._left), dict(self._started)
        names = [step.result for step in steps if step.result in open_steps]
        left = time_left(self._took, [open_steps[name] for name in names])
        if left is None:
            return None
        now = time.monotonic()
        return left - sum(now - started[name] for name in names if name in started) / self._at_once

    def _left_in_words(self) -> str:
        return f"time left: {in_words(self.time_left())}"

    def render(self) -> RenderableType:
        """The live table: as many rows as the terminal has, those around the running one first."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        lines = list(self.lines.values())
        shown = self._window(lines)
        room = self._console.width - max(len(line.job.title) for line in shown) - _BESIDE
        for heading in ("cell", "", ""):
            table.add_column(heading, no_wrap=True)
        for line in shown:
            style, detail = _STYLES.get(line.state, "dim"), Text(line.detail)
            detail.truncate(max(room, 10), overflow="ellipsis")  # rich would shorten other columns as well
            table.add_row(Text(line.job.title, style), Text(line.state, style), detail)
        counts = Counter(line.state for line in lines)
        summary = ", ".join(f"{count} {state}" for state, count in counts.items())
        more = f"  ({len(lines) - len(shown)} more not shown)" if len(shown) < len(lines) else ""
        return Group(table, Text(f"{summary}{more}; {self._left_in_words()}"))

    def _window(self, lines: Sequence[Line]) -> Sequence[Line]:
        room = max(3, self._console.height - _AROUND)
        is_open = [line.state in ("running", "waiting") for line in lines]
        current = is_open.index(True) if True in is_open else 0
        start = max(0, min(current - room // 2, len(lines) - room))
        return lines[start : start + room]


def total(seconds: Iterable[float | None]) -> tuple[float, int]:
    """Sum of what is known, and how many are not."""
    every = list(seconds)
    known = [each for each in every if each is not None]
    return sum(known, 0.0), len(every) - len(known)


def time_left(done: Sequence[tuple[float | None, float]], rest: Sequence[float | None]) -> float | None:
    """Seconds that the `rest` takes, its estimates corrected by how the finished steps kept theirs.

    Where steps have no estimate, the mean of the finished ones stands for each; None without any clue.

    Args:
        done: (estimate, what it took) of each finished step.
        rest: estimates of what is left.
    """
    known = [(estimate, took) for estimate, took in done if estimate]
    factor = sum(took for _, took in known) / sum(estimate for estimate, _ in known) if known else 1.0
    sure, unknown = total(rest)
    if not unknown:
        return factor * sure
    if not done:
        return None
    return factor * sure + unknown * sum(took for _, took in done) / len(done)


def in_words(seconds: float | None) -> str:
    """`1:02:03`, or a question mark."""
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))
