"""The numbers of `interference.json`: scores with intervals, averaged as in Figures 2 and 7, and how far they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mixlora_cli.analysis.interference.denominators import as_rows, count_denominators
from mixlora_cli.analysis.interference.passes import Floats
from mixlora_cli.analysis.interference.scores import (
    VARIANTS,
    Measurement,
    Scores,
    negative_interference,
    score,
)

MATRICES = ("A", "B")


def averages(measurement: Measurement) -> dict[str, dict[str, Scores]]:
    """For A and B, every variant with its bootstrap, over all groups."""
    return {
        matrix: {v: score(part, v, resample=True) for v in VARIANTS}
        for matrix, part in _by_matrix(measurement).items()
    }


def summarise(
    measurement: Measurement, average: dict[str, dict[str, Scores]], near_zero: float
) -> dict[str, Any]:
    """What `interference.json` says of the measurement, with plain numbers; null where a score is not defined.

    Args:
        average: of `averages`.
        near_zero: cosine below which a denominator counts as near zero.
    """
    return {
        "tasks": list(measurement.tasks),
        "batches": {t: len(p.norms) for t, p in zip(measurement.tasks, measurement.products, strict=True)},
        "average": {matrix: {v: _plain(s) for v, s in by.items()} for matrix, by in average.items()},
        "blocks": {
            block: {
                matrix: {v: _plain(score(part, v, resample=True)) for v in VARIANTS}
                for matrix, part in _by_matrix(measurement.only(_in(measurement, block=block))).items()
            }
            for block in _distinct(group.block for group in measurement.groups)
        },
        "layers": [
            {"layer": number, "block": block, "matrix": matrix, **_layer(part)}
            for number, block in _distinct((g.number, g.block) for g in measurement.groups)
            for matrix, part in _by_matrix(
                measurement.only(_in(measurement, block=block, number=number))
            ).items()
        ],
        "negative": {
            matrix: {v: negative(scores) for v, scores in by.items()} for matrix, by in average.items()
        },
        "denominators": {
            matrix: {"near_zero": near_zero, "tasks": as_rows(count_denominators(part, near_zero))}
            for matrix, part in _by_matrix(measurement).items()
        },
    }


def negative(scores: Scores) -> dict[str, Any]:
    """Mean negative part over pairs of tasks, with its interval, and how many pairs are negative."""
    apart = scores.value[~np.eye(len(scores.value), dtype=bool)]
    found: dict[str, Any] = {"value": number(negative_interference(scores.value))}
    if scores.samples is not None:
        low, high = np.nanpercentile(negative_interference(scores.samples), (2.5, 97.5))
        found |= {"low": number(low), "high": number(high)}
    return {**found, "negative_pairs": int((apart < 0).sum()), "pairs": int(np.isfinite(apart).sum())}


def layer_part(measurement: Measurement, block: str, layer: int | None, matrix: str) -> Measurement:
    """The groups of one matrix in one block of one transformer layer."""
    part = measurement.only(_in(measurement, block=block, number=layer))
    return part.only([group.matrix == matrix for group in part.groups])


def number(value: Any) -> float | None:
    """A float for JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


def _layer(part: Measurement) -> dict[str, Any]:
    plain: dict[str, Any] = {v: {"value": _numbers(score(part, v).value)} for v in VARIANTS if v != "mean"}
    return {"mean": _plain(score(part, "mean", resample=True)), **plain}


def _plain(scores: Scores) -> dict[str, Any]:
    interval = scores.interval()
    content = {"value": _numbers(scores.value)}
    return (
        content
        if interval is None
        else {**content, "low": _numbers(interval[0]), "high": _numbers(interval[1])}
    )


def _numbers(matrix: Floats) -> list[list[float | None]]:
    return [[number(value) for value in row] for row in matrix]


def _by_matrix(measurement: Measurement) -> dict[str, Measurement]:
    parts = {m: measurement.only([g.matrix == m for g in measurement.groups]) for m in MATRICES}
    return {matrix: part for matrix, part in parts.items() if part.groups}


def _in(measurement: Measurement, **wanted: Any) -> list[bool]:
    return [
        all(getattr(group, key) == value for key, value in wanted.items()) for group in measurement.groups
    ]


def _distinct(values: Any) -> list[Any]:
    found: Sequence[Any] = list(dict.fromkeys(values))
    return list(found)
