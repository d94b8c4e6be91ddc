"""How far the denominators u_i . g_b of Eq. 3 can be trusted: near zero they blow a ratio up, below it they turn it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mixlora_cli.analysis.interference.scores import Measurement, lengths_of_directions


@dataclass(frozen=True)
class Denominators:
    """Counts over batches and groups of one task; nothing but the undefined is left out of any score."""

    task: str
    batches: int
    total: int
    zero_gradients: int
    """The batch has no gradient there at all."""
    undefined: int
    """Exactly zero: no ratio, left out of the mean. Zero gradients are among them."""
    near_zero: int
    """Not zero, but the cosine of u_i and g_b is below the threshold: the ratio is kept and may be huge."""
    negative: int
    """The batch pulls against its own task's mean direction: its ratios have the other sign."""
    coherence: float
    """Mean cosine between two different batches of the task: 1 = all alike, 0 = nothing in common."""
    own_share: float
    """Median share of a denominator that is the batch's own contribution to u_i: 1 = nothing but itself."""


def count_denominators(measurement: Measurement, near_zero: float) -> list[Denominators]:
    """One entry for each task."""
    return [_count(measurement, i, near_zero) for i in range(len(measurement.tasks))]


def _count(measurement: Measurement, i: int, near_zero: float) -> Denominators:
    products = measurement.products[i]
    n = len(products.norms)
    own = products.projections[:, :, i]
    lengths = lengths_of_directions(products, i)
    defined = own != 0
    pulled = lengths > 0
    coherence = (n * lengths[pulled] ** 2 - 1) / (n - 1)
    return Denominators(
        task=measurement.tasks[i],
        batches=n,
        total=own.size,
        zero_gradients=int((products.norms == 0).sum()),
        undefined=int((~defined).sum()),
        near_zero=int((defined & (np.abs(own) < near_zero * lengths)).sum()),
        negative=int((own < 0).sum()),
        coherence=float(coherence.mean()) if pulled.any() else float("nan"),
        own_share=float(np.median(1 / (n * own[defined]))) if defined.any() else float("nan"),
    )


def as_rows(counts: list[Denominators]) -> list[dict[str, Any]]:
    """For JSON, where NaN is null."""
    return [
        {
            key: None if isinstance(value, float) and np.isnan(value) else value
            for key, value in asdict(one).items()
        }
        for one in counts
    ]
