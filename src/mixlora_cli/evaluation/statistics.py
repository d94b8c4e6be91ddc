"""95 % intervals: Wilson's for proportions, a seeded percentile bootstrap for composed scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
RESAMPLES = 2_000
SEED = 20_240


@dataclass(frozen=True)
class Interval:
    """A two-sided 95 % confidence interval, in the unit of the score it belongs to."""

    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """Both ends times `factor` (100 turns a proportion into per cent)."""
        return Interval(self.low * factor, self.high * factor)


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), within [0, 1].

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) with p = successes / trials.
    Raises ValueError unless 0 <= successes <= trials and trials > 0.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"wilson: {successes} of {trials} is no proportion")
    share = successes / trials
    weight = 1 + Z_95**2 / trials
    centre = (share + Z_95**2 / (2 * trials)) / weight
    half = Z_95 * math.sqrt(share * (1 - share) / trials + Z_95**2 / (4 * trials**2)) / weight
    # At 0 and at n the formula gives exactly 0 and 1; rounding may miss them by 1e-17.
    return Interval(0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half)


def bootstrap_means(values: Floats, rng: np.random.Generator, resamples: int = RESAMPLES) -> Floats:
    """Means of `resamples` samples of the rows of `values` (units, numbers), drawn with replacement:
    (resamples, numbers).

    Rows that are equal are drawn together: how often each distinct row occurs among n draws is multinomial,
    which is the same distribution as drawing n indices and costs the number of distinct rows instead of n.
    """
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(
            f"bootstrap_means: expected (units, numbers) with units > 0, got shape {values.shape}"
        )
    rows, counts = np.unique(values, axis=0, return_counts=True)
    return bootstrap_counts(rows, counts, rng, resamples)


def bootstrap_counts(
    rows: Floats, counts: Integers, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Floats:
    """`bootstrap_means` where the distinct rows (kinds, numbers) and how often each occurs (kinds,) are known."""
    total = int(counts.sum())
    drawn = rng.multinomial(total, counts / total, size=resamples)
    means: Floats = drawn @ rows / total
    return means


def percentile(samples: Floats) -> Interval:
    """The central 95 % of bootstrap samples (resamples,)."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return Interval(float(low), float(high))
