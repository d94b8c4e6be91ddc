"""report.html: one file with everything in it, filled from a template with every text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from mixlora_cli import __version__
from mixlora_cli.benchmarks.registry import LOSS_TITLE, seen_title
from mixlora_cli.evaluation.results import (
    ABSENT,
    JudgedScore,
    Results,
    Row,
    Score,
    columns_of,
    loss_text,
    seen_text,
)
from mixlora_cli.judging.verdicts import judged_table
from mixlora_cli.report.answers import UNREAD, Confusion, Evaluated, Shown, confusions
from mixlora_cli.report.thumbnails import encoded
from mixlora_cli.report.training import Drawn

LONGEST_TEXT = 1_500
"""Characters of a question or an answer that are shown."""
WRITTEN_OUT = 20
"""Confusion matrices with more labels are drawn as a picture instead of a table."""
MME_SUBTASK = 200.0
"""Points that one of MME's subtasks can give."""
_ACCENT = (47, 111, 208)
_CELL = 5
"""Pixels of a cell in such a picture."""


@dataclass(frozen=True)
class Card:
    """One instance of the sample with its picture."""

    shown: Shown
    picture: str | None
    """Data URI; None where there is no picture to show."""


def write_page(runs: Sequence[Evaluated], cards: Sequence[Card], notes: Sequence[str], drawn: Drawn) -> str:
    """The whole page as text. `notes` are sentences about what the data or the page leave out."""
    rows = [(run.label, run.results) for run in runs]
    templates = Environment(
        loader=PackageLoader("mixlora_cli.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = columns_of(rows)
    judged = judged_table(rows)
    return templates.get_template("report.html.jinja").render(
        style=_inline("report.css"),
        script=_inline("report.js"),
        trained=drawn.told,
        figures=[(*figure, encoded(Image.open(figure[-1]), "PNG")) for figure in drawn.figures],
        version=__version__,
        runs=runs,
        columns=columns,
        table=[(label, [_cell(results, column) for column in columns]) for label, results in rows],
        bars=bars_of(rows),
        judged_columns=judged.headings[1:] if judged else (),
        judged=judged.rows if judged else (),
        seen=_seen_rows(rows),
        has_losses=any(results.loss for _, results in rows),
        matrices=[(run.label, [_matrix(found) for found in confusions(run)]) for run in runs],
        rules=rules_of(rows),
        cards=cards,
        shown_columns=list(dict.fromkeys(card.shown.column for card in cards)),
        notes=notes,
        cut=_cut,
    )


def _inline(name: str) -> Markup:
    """A file of this package, as it stands."""
    return Markup(resources.files("mixlora_cli.report").joinpath("page", name).read_text(encoding="utf-8"))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "\N{HORIZONTAL ELLIPSIS}"


def _cell(results: Results, column: str) -> list[str]:
    """Value and interval, and what is missing of a sum."""
    score = results.column(column)
    return score.cell.joined("\n").split("\n") if score else [ABSENT]


def _seen_rows(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """A row for each seen task: a cell for each run, and one for its loss where some run has losses."""
    tasks = dict.fromkeys(task for _, results in rows if results.seen for task in results.seen.parts)
    has_losses = any(results.loss for _, results in rows)
    return [
        (
            seen_title(task),
            [seen_text(results.seen, task) for _, results in rows]
            + [loss_text(results.loss, task) for _, results in rows if has_losses],
        )
        for task in tasks
    ]


def rules_of(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Column, instances and rule of every score of the first run that has it."""
    found: dict[str, tuple[str, str, str]] = {}
    for _, results in rows:
        for score in (*results.scores, results.mean, results.seen, results.loss):
            if score is not None:
                found.setdefault(score.column, (score.column, str(score.n), score.rule))
    return list(found.values())


def _matrix(confusion: Confusion) -> dict[str, Any]:
    small = len(confusion.labels) <= WRITTEN_OUT
    rows = zip(confusion.labels, confusion.counts, confusion.shares(), strict=True)
    return {
        "column": confusion.column,
        "labels": confusion.labels,
        "unread": UNREAD,
        "rows": [(label, list(zip(counts, shares, strict=True))) for label, counts, shares in rows]
        if small
        else [],
        "picture": None if small else _drawn(confusion),
        "worst": confusion.most_confused(),
    }


def _drawn(confusion: Confusion) -> str:
    """The shares as the opacity of one colour, which reads on light and dark alike."""
    shares = np.array(confusion.shares())
    cells = np.zeros((*shares.shape, 4), dtype=np.uint8)
    cells[..., :3] = _ACCENT
    cells[..., 3] = np.round(255 * np.sqrt(shares))
    return encoded(Image.fromarray(cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1)), "PNG", optimize=True)


@dataclass(frozen=True)
class Bar:
    """One bar; lengths are per cent of the width."""

    series: str
    """Name in the legend."""
    colour: int
    """Number of the run."""
    judged: bool
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Bars:
    """The bars of one column of the table."""

    column: str
    scale: str
    """What the full width stands for."""
    bars: tuple[Bar, ...]


def bars_of(rows: Sequence[Row]) -> list[Bars]:
    """A group of bars for each column that some row has a score in."""
    groups = []
    for column in columns_of(rows):
        if column == LOSS_TITLE:
            continue  # the longer bar would be the worse one
        scores = [score for _, results in rows if (score := results.column(column))]
        widest = max(scores, key=_most, default=None)
        most = 100.0 if widest is None else _most(widest)
        bars = [
            bar
            for number, (label, results) in enumerate(rows)
            for bar in _bars(number, label, results, column, most)
        ]
        if bars:
            groups.append(Bars(column, _scale(widest), tuple(bars)))
    return groups


def _most(score: Score) -> float:
    """The largest value that a score can have."""
    return MME_SUBTASK * max(score.num_subtasks, 1) if score.unit == "points" else 100.0


def _scale(widest: Score | None) -> str:
    if widest is None or widest.unit != "points":
        return "100 %"
    return ", ".join(filter(None, (f"{_most(widest):.0f} points", widest.incomplete)))


def _bars(number: int, label: str, results: Results, column: str, most: float) -> list[Bar]:
    score = results.column(column)
    bars = []
    if score is not None:
        bars.append(_bar(label, number, False, score, most, replace(score.cell, beside="").joined(" ")))
    for judged in results.judged:
        found = [
            s for s in (*judged.scores, judged.mean, judged.seen) if s is not None and s.column == column
        ]
        for said in found:
            text = f"{said.value:.1f} [{said.low:.1f}, {said.high:.1f}]"
            bars.append(_bar(f"judge: {judged.title}", number, True, said, 100.0, text))
    return bars


def _bar(series: str, colour: int, judged: bool, score: Score | JudgedScore, most: float, text: str) -> Bar:
    value, low, high = (
        min(max(100 * (score.value if end is None else end) / most, 0.0), 100.0)
        for end in (score.value, score.low, score.high)
    )
    return Bar(series, colour, judged, value, low, high, text)
