"""Go through a grid: what is there stays, what was interrupted resumes, what fails is noted and the next one comes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mixlora_cli.launch import threads_each
from mixlora_cli.reproduce.board import Board
from mixlora_cli.reproduce.cell import Cell, Part, begin, finished, write_record
from mixlora_cli.reproduce.estimate import in_words
from mixlora_cli.reproduce.process import PROGRAM, StopRequest, last_line, locked, run_logged
from mixlora_cli.training.run_folder import read_metrics

_DETAIL = 70  # characters of a log's line


@dataclass(frozen=True)
class Failure:
    """A part that did not end well."""

    cell: Cell
    part: Part
    log: Path
    reason: str


@dataclass
class Outcome:
    """What became of the grid."""

    done: list[Cell] = field(default_factory=list)
    """Complete now, whether they were run or there already."""
    failed: list[Failure] = field(default_factory=list)
    elsewhere: list[Cell] = field(default_factory=list)
    """Left to another process that is at work on them."""
    stopped: bool = False


class Runner:
    """Runs cells in their order, `jobs` of them at a time, each part in a process of its own."""

    def __init__(
        self,
        board: Board,
        stop: StopRequest,
        program: Sequence[str] = PROGRAM,
        keep_checkpoints: bool = False,
        jobs: int = 1,
    ) -> None:
        self._board = board
        self._stop = stop
        self._program = program
        self._keep_checkpoints = keep_checkpoints
        self._jobs = jobs
        self._outcome = Outcome()
        self._ended: dict[Path, Future[None]] = {}

    def run(self, cells: Sequence[Cell]) -> Outcome:
        """Do what is missing of every cell. A cell whose files cannot be written has failed; the others go on."""
        with ThreadPoolExecutor(self._jobs) as pool:
            for cell in cells:
                self._ended[cell.folder] = pool.submit(self._take, cell)
            ended, _ = wait(self._ended.values(), return_when=FIRST_EXCEPTION)
            if any(each.exception() for each in ended):
                self._stop.ask()  # a mistake of ours: end the others, so that it is seen now and not in hours
        for each in self._ended.values():
            each.result()
        for found in (self._outcome.done, self._outcome.elsewhere):
            found.sort(key=cells.index)
        self._outcome.failed.sort(key=lambda failure: cells.index(failure.cell))
        self._outcome.stopped = self._stop.wanted
        return self._outcome

    def _take(self, cell: Cell) -> None:
        if cell.after in self._ended:  # it comes earlier in the order, so it has been started
            self._ended[cell.after].exception()
        if self._stop.wanted:
            return
        with locked(cell.folder) as lock:
            if lock is None:
                self._outcome.elsewhere.append(cell)
                self._board.change(cell, "elsewhere", f"another process is at work in {cell.folder}")
            else:
                self._do(cell, lock)

    def _do(self, cell: Cell, lock: IO[str]) -> None:
        missing = [part for part in cell.parts if not finished(cell, part)]
        for part in cell.parts:
            if part not in missing:
                self._board.skip(part)
        if not missing:
            write_record(cell, when=time.time())
            self._outcome.done.append(cell)
            self._board.change(cell, "there")
            return
        took = 0.0
        for part in missing:
            self._board.change(cell, "running", part.name)
            self._board.start(part)
            try:
                reason = self._run_part(cell, part, lock)
            except OSError as error:
                reason = f"{error.filename or cell.folder}: {error.strerror or error}"
            took += self._board.finish(part, succeeded=reason is None)
            if reason is not None:
                self._note(cell, part, reason)
                return
        self._outcome.done.append(cell)
        self._board.change(cell, "done", f"in {in_words(took)}")

    def _run_part(self, cell: Cell, part: Part, lock: IO[str]) -> str | None:
        """Run one command; returns why it did not end well, or None."""
        begin(cell, part, when=time.time())
        log, start = _log(cell, part), time.monotonic()
        code = run_logged(
            self._program,
            part.arguments,
            log,
            lock,
            self._stop,
            lambda: self._board.look(cell, _progress(cell, part)),
            self._share(),
        )
        if code != 0:
            ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            return f"{ended}: {last_line(log)[:300]}"
        if not finished(cell, part):
            return f"exit code 0, but {part.result} is not there or not what was asked for"
        write_record(cell, part, seconds=round(time.monotonic() - start, 1))
        if part.name == "train" and not self._keep_checkpoints:
            shutil.rmtree(
                cell.folder / "checkpoints", ignore_errors=True
            )  # gigabytes, where all weights are trained
        return None

    def _share(self) -> dict[str, str]:
        """Threads for each of several processes; a lone one, or a user who says how many, is left alone."""
        if self._jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(threads_each(self._jobs))}

    def _note(self, cell: Cell, part: Part, reason: str) -> None:
        if self._stop.wanted:
            self._board.change(cell, "stopped", f"in {part.name}")
            return
        log = _log(cell, part)
        self._outcome.failed.append(Failure(cell, part, log, reason))
        self._board.change(cell, "failed", f"{part.name}, {reason}; log: {log}")


def _log(cell: Cell, part: Part) -> Path:
    return cell.folder / f"{part.name}.log"


def _progress(cell: Cell, part: Part) -> str:
    """Step and loss of a training; of other parts what they said last."""
    if part.name == "train" and (rows := read_metrics(cell.folder / "metrics.jsonl")):
        of = f"/{part.steps}" if part.steps else ""
        return f"train, step {rows[-1]['step']}{of}, loss {rows[-1]['loss']:.3f}"
    return f"{part.name}: {last_line(_log(cell, part))[:_DETAIL]}"
