"""From seconds by round to medians and ratios, each with how sure it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2_000
SEED = 20_240


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; None is a number that these rounds do not tell."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Spread:
    """Seconds of one variant over the counted rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int


def spread(seconds: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, middle, high = (float(value) for value in np.percentile(np.asarray(seconds), (25, 50, 75)))
    return Spread(middle, low, high, len(seconds))


def exact(value: float) -> Estimate:
    """A ratio of counts, which do not vary."""
    return Estimate(value, value, value)


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Ratio of the medians of two variants that ran in the same rounds."""
    return _bootstrapped(np.asarray([above, below]), lambda medians: (medians[0], medians[1]))


def median(seconds: Sequence[float]) -> Estimate:
    """Median seconds of one variant."""
    return ratio(seconds, [1.0] * len(seconds))


def extra(variant: Sequence[float], linear: Sequence[float]) -> Estimate:
    """Seconds above the frozen linear layer alone: median of the differences within a round."""
    rows = np.asarray([_differences(variant, linear), np.ones(len(linear))])
    return _bootstrapped(rows, lambda medians: (medians[0], medians[1]))


def ratio_of_extras(above: Sequence[float], below: Sequence[float], linear: Sequence[float]) -> Estimate:
    """Ratio of what two variants take above the frozen linear layer alone.

    Unknown (None) where the lower one is not slower than the linear layer, with no upper end where that is possible.
    """
    rows = np.asarray([_differences(above, linear), _differences(below, linear)])
    return _bootstrapped(rows, lambda medians: (medians[0], medians[1]))


def _differences(variant: Sequence[float], linear: Sequence[float]) -> Floats:
    # Within a round the machine was in the same mood for both.
    return np.asarray(variant, dtype=np.float64) - np.asarray(linear, dtype=np.float64)


def _bootstrapped(rows: Floats, parts: Callable[[Floats], tuple[Floats, Floats]]) -> Estimate:
    """Median of row 0 over median of row 1, with a percentile bootstrap over rounds (columns, drawn together)."""
    value = _divide(*parts(np.median(rows, axis=1)))
    count = rows.shape[1]
    drawn = np.random.default_rng(SEED).integers(0, count, size=(RESAMPLES, count))
    samples = _divide(*parts(np.median(rows[:, drawn], axis=2)))
    # Infinities have no place between them: take ends that occurred.
    low = float(np.percentile(samples, 2.5, method="lower"))
    high = float(np.percentile(samples, 97.5, method="higher"))
    return Estimate(_finite(float(value)), _finite(low), _finite(high))


def _divide(above: Floats, below: Floats) -> Floats:
    """Quotient; infinite where the divisor is not positive."""
    positive = below > 0
    quotient: Floats = np.where(positive, above / np.where(positive, below, 1.0), np.inf)
    return quotient


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
