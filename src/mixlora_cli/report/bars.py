"""Lengths of the bars: every score on a scale of its own range, per run and per judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixlora_cli.evaluation.results import JudgedScore, Results, Row, Score, columns_of

MME_SUBTASK = 200.0
"""Points that one of MME's subtasks can give."""


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
        min(max(100 * end / most, 0.0), 100.0) for end in (score.value, score.low, score.high)
    )
    return Bar(series, colour, judged, value, low, high, text)
