"""What a person sees of a grid: a live table in a terminal, a line for each change in a file or a pipe."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mixlora_cli.reproduce.cell import Cell, Part
from mixlora_cli.reproduce.estimate import in_words, time_left

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
    """One cell's line."""

    cell: Cell
    state: State = "waiting"
    detail: str = ""


class Board:
    """The grid as it stands; also keeps what parts took, from which the time left follows."""

    def __init__(self, cells: Sequence[Cell], console: Console, jobs: int = 1) -> None:
        """`jobs`: how many cells run at a time, each on its share of the machine."""
        self.lines = [Line(cell) for cell in cells]
        self._console = console
        self._jobs = jobs
        self._took: list[tuple[float | None, float]] = []
        self._started: dict[int, float] = {}
        self._left = {id(part): part.seconds for cell in cells for part in cell.parts}
        self._live = (
            Live(get_renderable=self.render, console=console, refresh_per_second=2)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()

    def change(self, cell: Cell, state: State, detail: str = "") -> None:
        """A cell's state is another now."""
        place = next(number for number, line in enumerate(self.lines) if line.cell is cell)
        self.lines[place].state, self.lines[place].detail = state, detail
        if state not in ("waiting", "running"):
            for part in cell.parts:
                self._left.pop(id(part), None)
        if self._live is None:
            text = f"[{place + 1}/{len(self.lines)}] {cell.title}: {state}{f', {detail}' if detail else ''}"
            self._say(f"{text}  ({self._left_in_words()})" if state in ("running", "done") else text)

    def look(self, cell: Cell, detail: str) -> None:
        """How a running cell gets on; seen in a terminal alone."""
        line = next(line for line in self.lines if line.cell is cell)
        line.detail = detail

    def start(self, part: Part) -> None:
        """The part's time begins."""
        self._started[id(part)] = time.monotonic()

    def finish(self, part: Part, succeeded: bool) -> float:
        """The part's time ends; returns how long it took, in seconds."""
        took = time.monotonic() - self._started.pop(id(part))
        self._left.pop(id(part), None)
        if succeeded:  # of the whole machine, as the estimates are
            self._took.append((part.seconds, took / self._jobs))
        return took

    def skip(self, part: Part) -> None:
        """The part was there already."""
        self._left.pop(id(part), None)

    def time_left(self) -> float | None:
        """Seconds until the last cell is done: what all together take the machine, or what the longest cell takes."""
        cells = [line.cell.parts for line in self.lines]
        found = [self._machine_time(part for parts in cells for part in parts)]
        alone = [self._machine_time(parts) for parts in cells]
        found += [None if each is None else self._jobs * each for each in alone]
        known = [each for each in found if each is not None]
        return None if len(known) < len(found) else max(0.0, *known)

    def _machine_time(self, parts: Iterable[Part]) -> float | None:
        """Seconds of the whole machine that are still needed for these parts; those that run had some already."""
        # As they are now: other threads change them.
        open_parts, started = dict(self._left), dict(self._started)
        names = [id(part) for part in parts if id(part) in open_parts]
        left = time_left(self._took, [open_parts[name] for name in names])
        if left is None:
            return None
        now = time.monotonic()
        return left - sum(now - started[name] for name in names if name in started) / self._jobs

    def _left_in_words(self) -> str:
        return f"time left: {in_words(self.time_left())}"

    def render(self) -> RenderableType:
        """The live table: as many rows as the terminal has, those around the running one first."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        shown = self._window()
        room = self._console.width - max(len(line.cell.title) for line in shown) - _BESIDE
        for heading in ("cell", "", ""):
            table.add_column(heading, no_wrap=True)
        for line in shown:
            style = _STYLES.get(line.state, "dim")
            detail = Text(line.detail)
            detail.truncate(
                max(room, 10), overflow="ellipsis"
            )  # rich would shorten the other columns as well
            table.add_row(Text(line.cell.title, style), Text(line.state, style), detail)
        counts = Counter(line.state for line in self.lines)
        summary = ", ".join(f"{count} {state}" for state, count in counts.items())
        hidden = len(self.lines) - len(shown)
        more = f"  ({hidden} more not shown)" if hidden else ""
        return Group(table, Text(f"{summary}{more}; {self._left_in_words()}"))

    def _window(self) -> list[Line]:
        room = max(3, self._console.height - _AROUND)
        current = next(
            (place for place, line in enumerate(self.lines) if line.state in ("running", "waiting")), 0
        )
        start = max(0, min(current - room // 2, len(self.lines) - room))
        return self.lines[start : start + room]

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
