"""How a training went, by the rows of its `metrics.jsonl`: the loss over spans of steps, and what the routers chose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mixlora_cli.stats import Floats, Integers

Rows = Sequence[Mapping[str, Any]]
Curve = Mapping[int, float]
"""A number by step."""


def losses(rows: Rows) -> Curve:
    """The loss of each row, at its last step, of rows that have one."""
    return {row["step"]: row["loss"] for row in rows if math.isfinite(row.get("loss", math.nan))}


def mean_losses(rows: Rows, first: ArrayLike, last: ArrayLike) -> tuple[Floats, Integers]:
    """Mean losses over spans of steps.

    Args:
        rows: of `metrics.jsonl`, in order.
        first: (N,) or a number, the first steps of the spans.
        last: (N,) or a number, the last ones.

    Returns:
        (N,) The mean of the rows that lie within a span, each weighted with the steps that it is the mean of; nan
        where there are none. (N,) How many steps these are.
    """
    found = losses(rows)
    counts = np.array([row["loss_steps"] for row in rows if row["step"] in found], dtype=np.int64)
    ends = np.array(list(found), dtype=np.int64)
    totals = np.concatenate([[0.0], np.cumsum(counts * list(found.values()))])
    steps = np.concatenate([[0], np.cumsum(counts)])
    start = np.searchsorted(ends - counts + 1, first)
    stop = np.maximum(np.searchsorted(ends, last, "right"), start)
    within = steps[stop] - steps[start]
    with np.errstate(invalid="ignore"):
        return (totals[stop] - totals[start]) / within, within


def routing(rows: Rows, name: str) -> Curve:
    """A measure of the routers, the mean over the layers, at the steps that have it."""
    return {row["step"]: row["routing"][name] for row in rows if name in row.get("routing", {})}
