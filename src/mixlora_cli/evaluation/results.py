"""What an evaluation found: the file it is kept in, and its tables.

`results.json` is `{"format", "about": {...}, "scores": [Score], "mean": Score | null, "seen": Score | null,
"judged": [Judged], "loss": Score | null}` with the fields of the dataclasses below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console

from mixlora_cli.benchmarks.metrics import subtasks_in
from mixlora_cli.benchmarks.registry import (
    COLUMNS,
    LOSS_TITLE,
    MEAN_TITLE,
    SEEN_TITLE,
    benchmark_named,
    seen_title,
)
from mixlora_cli.errors import UserError, cut
from mixlora_cli.stats import Estimate
from mixlora_cli.store import write_json
from mixlora_cli.tables import Cell, Table, markdown, show

FORMAT = "mixlora-results/1"
FILE_NAME = "results.json"
DIGITS = {"%": 1, "points": 0, "nats": 3}
"""By unit the decimals of a score."""


@dataclass(frozen=True)
class Score:
    """One number with everything needed to trust it."""

    name: str
    column: str
    """Its heading in tables: the paper's name."""
    value: float
    low: float | None
    """Lower end of the 95 % interval, in the unit of `value`; None where nothing is known of the spread."""
    high: float | None
    n: int
    """Instances that were answered."""
    unit: str
    """A key of `DIGITS`."""
    rule: str
    """The rule that made the number."""
    parts: Mapping[str, Mapping[str, float]]
    """Numbers of each subtask, category or seen task."""

    @property
    def num_subtasks(self) -> int:
        """How many subtasks the sum has; 0 where it is none."""
        return len(subtasks_in(self.parts)) if self.unit == "points" else 0

    @property
    def cell(self) -> Cell:
        """The value, its interval, and how much of a sum is there if not all of it."""
        digits = DIGITS[self.unit]
        interval = Estimate(self.value, self.low, self.high).interval_text(digits)
        return Cell(f"{self.value:.{digits}f}", interval, self.incomplete)

    @property
    def incomplete(self) -> str:
        """`9 of 14 subtasks` where a sum lacks some, so that it is not read as a whole one; else ""."""
        whole = benchmark_named(self.name).num_subtasks
        return f"{self.num_subtasks} of {whole} subtasks" if 0 < self.num_subtasks < whole else ""


@dataclass(frozen=True)
class JudgedScore:
    """What one judge says of one benchmark's answers, in per cent."""

    name: str
    column: str
    value: float
    """Per cent of answers that it calls right."""
    low: float
    high: float
    n: int
    unparsed: int
    """Replies of the judge that decide nothing; counted as wrong."""


@dataclass(frozen=True)
class Agreement:
    """How often two judges say the same of an answer."""

    share: float
    """Per cent of the `n` answers that both have judged."""
    n: int


@dataclass(frozen=True)
class Judged:
    """The scores that one judge gives."""

    judge: Mapping[str, Any]
    """title, judge, model, revision, digest of the prompt and decoding."""
    scores: tuple[JudgedScore, ...]
    """One for each benchmark that it has judged whole, in the paper's order."""
    mean: JudgedScore | None
    """Mean of the paper's columns other than MME; None unless all seven are judged."""
    seen: JudgedScore | None
    """Mean over the seen tasks; None unless all are judged."""
    agreement: Mapping[str, Agreement]
    """With every other judge, by its title, and with the rule "exact"."""

    @property
    def title(self) -> str:
        """Short name of the judge."""
        return str(self.judge["title"])


@dataclass(frozen=True)
class Results:
    """The scores of one model."""

    about: Mapping[str, Any]
    """label, run, limit, seed, versions and the predictions' fingerprint."""
    scores: tuple[Score, ...]
    """One for each benchmark, in the paper's order."""
    mean: Score | None
    """MMAvg, the mean of the paper's columns other than MME; None unless all seven were evaluated."""
    seen: Score | None
    """Held-out instances of the seen tasks: mean over tasks, each in `parts`; None unless answered."""
    judged: tuple[Judged, ...] = ()
    """One for each judge that was asked."""
    loss: Score | None = None
    """Of the same instances: loss per answer token, mean over tasks, each in `parts`; None where it is not known."""

    @property
    def label(self) -> str:
        """Short name of what was evaluated."""
        return str(self.about.get("label", "model"))

    def column(self, title: str) -> Score | None:
        """The score under this heading, of a benchmark or a mean."""
        found = (*self.scores, self.mean, self.seen, self.loss)
        return next((score for score in found if score is not None and score.column == title), None)


def write_results(results: Results, path: Path) -> None:
    """Write `results.json` whole or not at all."""
    write_json(path, {"format": FORMAT, **asdict(results)})


def read_results(path: Path) -> Results:
    """Read `results.json`, or the one in a folder. Raises UserError when there is none, or another file."""
    path = path / FILE_NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("format")
        return TypeAdapter(Results).validate_python(content)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `mixlora eval` first") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # pydantic's is a ValueError
        raise UserError(f"{path} is no results file of this version (expected format {FORMAT})") from error


Row = tuple[str, Results]
"""What a row is called, and its results."""
ABSENT = "-"
CAPTION = "[...]: 95 % interval."
PAPER_CAPTION = " MME in points, the rest in per cent; MMAvg is the mean of the seven others."
SEEN_CAPTION = " Seen: held-out instances of the training tasks."
LOSS_CAPTION = f" {LOSS_TITLE}: loss per answer token of held-out instances in nats, lower is better."


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Headings: the paper's eight and MMAvg where one has a score (or nothing has), others, Seen and its loss."""
    scored = dict.fromkeys(score.column for _, results in rows for score in results.scores)
    others = [column for column in scored if column not in COLUMNS]
    held_out = [
        column for column in (SEEN_TITLE, LOSS_TITLE) if any(results.column(column) for _, results in rows)
    ]
    paper = [*COLUMNS, MEAN_TITLE] if len(others) < len(scored) or not (others or held_out) else []
    return [*paper, *others, *held_out]


def results_table(rows: Sequence[Row], title: str = "") -> Table:
    """A row for each model, a column for each benchmark."""
    columns = columns_of(rows)
    lines = tuple(
        (label, *(score.cell if (score := results.column(column)) else ABSENT for column in columns))
        for label, results in rows
    )
    in_points = any(score.unit != "%" for _, results in rows for score in results.scores)
    caption = CAPTION + (PAPER_CAPTION if MEAN_TITLE in columns else "" if in_points else " In per cent.")
    caption += SEEN_CAPTION if SEEN_TITLE in columns else ""
    caption += LOSS_CAPTION if LOSS_TITLE in columns else ""
    return Table(title, ("", *map(cut, columns)), lines, notes=(caption,))


def seen_table(rows: Sequence[Row]) -> Table:
    """Held-out accuracy on the tasks of training: a line for each task and the mean, a column a model."""
    scored = [(label, results.seen) for label, results in rows if results.seen is not None]
    frequent = {task: part.get("most_frequent") for _, seen in scored for task, part in seen.parts.items()}
    lines: list[tuple[str, ...]] = []
    for task, share in frequent.items():
        chance = ABSENT if share is None else f"{share:.1f}"
        lines.append((cut(seen_title(task)), chance, *(seen_text(seen, task) for _, seen in scored)))
    known = [share for share in frequent.values() if share is not None]
    mean = f"{sum(known) / len(known):.1f}" if known else ABSENT
    lines.append(("mean", mean, *(seen.cell.joined(" ") for _, seen in scored)))
    title = "Seen tasks, held-out instances: exact match in per cent [95 % interval]"
    headings = ("task", "most frequent answer", *(label for label, _ in scored))
    return Table(title, headings, tuple(lines), last_apart=True)


def seen_text(seen: Score | None, task: str) -> str:
    """One seen task's accuracy and its interval."""
    part = seen.parts.get(task) if seen else None
    return f"{part['accuracy']:.1f} [{part['low']:.1f}, {part['high']:.1f}]" if part else ABSENT


def loss_table(rows: Sequence[Row]) -> Table:
    """Held-out loss on the tasks of training: a line for each task and the mean, a column a model."""
    scored = [(label, results.loss) for label, results in rows if results.loss is not None]
    tasks = dict.fromkeys(task for _, loss in scored for task in loss.parts)
    lines = [(cut(seen_title(task)), *(loss_text(loss, task) for _, loss in scored)) for task in tasks]
    lines.append(("mean", *(loss.cell.joined(" ") for _, loss in scored)))
    title = "Seen tasks, held-out instances: loss per answer token in nats [95 % interval], lower is better"
    return Table(title, ("task", *(label for label, _ in scored)), tuple(lines), last_apart=True)


def loss_text(loss: Score | None, task: str) -> str:
    """One seen task's loss per answer token and its interval."""
    part = loss.parts.get(task) if loss else None
    if part is None:
        return ABSENT
    return Estimate(part["loss"], part.get("low"), part.get("high")).text(DIGITS["nats"])


def print_results(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the paper's table, and those of the seen tasks where some row has them."""
    console = console or Console()
    if any(results.scores for _, results in rows):
        limits = sorted({int(limit) for _, results in rows if (limit := results.about.get("limit"))})
        sample = f" (samples of at most {', '.join(map(str, limits))} instances each)" if limits else ""
        show(results_table(rows, f"Unseen tasks{sample}"), console, turn=True)
    if any(results.seen for _, results in rows):
        show(seen_table(rows), console)
    if any(results.loss for _, results in rows):
        show(loss_table(rows), console)


def results_markdown(rows: Sequence[Row]) -> str:
    """The paper's table, its caption below."""
    return markdown(results_table(rows))
