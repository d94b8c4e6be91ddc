"""Interference scores (Eq. 3) out of the products of the second pass, and variants that small denominators move less.

With p_bj = u_j . g_b / |g_b| for batch b of task i, the ratio of Eq. 3 is (u_j . g_b) / (u_i . g_b) = p_bj / p_bi.
Indices: batch b (n), group g (G), task j (T), bootstrap sample s (R).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mixlora_cli.analysis.interference.groups import Group
from mixlora_cli.analysis.interference.passes import Floats, Products
from mixlora_cli.config import Variant

RESAMPLES = 1_000
_SEED = 20_240
VARIANTS: tuple[Variant, ...] = ("mean", "median", "ratio_of_means", "cosine")


@dataclass(frozen=True)
class Measurement:
    """All products of a run, or those of some of its groups."""

    tasks: tuple[str, ...]
    groups: tuple[Group, ...]
    products: tuple[Products, ...]
    """By task i, whose batches they are of."""

    def only(self, chosen: Sequence[bool]) -> Measurement:
        """The same with fewer groups."""
        keep = np.flatnonzero(np.array(chosen, dtype=bool))
        parts = (Products(p.projections[:, keep], p.norms[:, keep]) for p in self.products)
        return replace(self, groups=tuple(self.groups[k] for k in keep), products=tuple(parts))


@dataclass(frozen=True)
class Scores:
    """I[i, j], the effect of task j (column) on task i (row), over the groups of a measurement."""

    value: Floats
    """(T, T); NaN where it is not defined."""
    samples: Floats | None = None
    """(R, T, T): what other draws of the same number of batches would have given; None where it was not asked for."""

    def interval(self) -> tuple[Floats, Floats] | None:
        """Ends of the 95 % intervals, (T, T) each."""
        if self.samples is None:
            return None
        with _quiet():
            low, high = np.nanpercentile(self.samples, (2.5, 97.5), axis=0)
        return low, high


def ratios(products: Products, i: int) -> Floats:
    """(n, G, T): Eq. 3's ratio for each batch of task i; NaN where its denominator is exactly zero."""
    denominator = products.projections[:, :, i : i + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, products.projections / denominator)


def score(measurement: Measurement, variant: Variant, resample: bool = False) -> Scores:
    """Scores over all groups of the measurement; a single group's own where it has one.

    - mean: Eq. 3, averaged over groups.
    - median: over batches, of the median over groups.
    - ratio_of_means: mean over batches of u_j . g_b over that of u_i . g_b, averaged over groups.
    - cosine: of u_i and u_j, averaged over groups; no intervals, because u would have to be computed anew.
    """
    rule = {"mean": _mean, "median": _median, "ratio_of_means": _ratio_of_means}.get(variant)
    if rule is None:
        return Scores(_cosine(measurement))
    values, samples = [], []
    for i, products in enumerate(measurement.products):
        n = len(products.norms)
        values.append(rule(products, i, np.arange(n)[None])[0])
        if resample:
            samples.append(rule(products, i, draws(n, i)))
    return Scores(np.stack(values), np.stack(samples, axis=1) if resample else None)


def draws(n: int, i: int, resamples: int = RESAMPLES) -> NDArray[np.int64]:
    """(R, n) bootstrap draws of task i's batches: the same for every run, so that runs can be compared in pairs."""
    return np.random.default_rng([_SEED, i]).integers(n, size=(resamples, n))


def _mean(products: Products, i: int, drawn: NDArray[np.int64]) -> Floats:
    """(R, T); a batch without any defined ratio is left out (and counted by `denominators`)."""
    with _quiet():
        by_batch = np.nanmean(ratios(products, i), axis=1)
        mean: Floats = np.nanmean(by_batch[drawn], axis=1)
    return mean


def _median(products: Products, i: int, drawn: NDArray[np.int64]) -> Floats:
    with _quiet():
        by_batch = np.nanmedian(ratios(products, i), axis=1)
        median: Floats = np.nanmedian(by_batch[drawn], axis=1)
    return median


def _ratio_of_means(products: Products, i: int, drawn: NDArray[np.int64]) -> Floats:
    changes = products.projections * products.norms[:, :, None]
    n = len(changes)
    counts = np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64) / n
    means = (counts @ changes.reshape(n, -1)).reshape(len(drawn), *changes.shape[1:])
    denominator = means[:, :, i : i + 1]
    with np.errstate(divide="ignore", invalid="ignore"), _quiet():
        mean: Floats = np.nanmean(np.where(denominator == 0, np.nan, means / denominator), axis=1)
    return mean


def _cosine(measurement: Measurement) -> Floats:
    """(T, T), from u_i . u_j = mean over task i's batches of p_bj."""
    inner = np.stack([products.projections.mean(axis=0) for products in measurement.products])  # (T, G, T)
    lengths = np.sqrt(np.clip(np.einsum("igi->ig", inner), 0, None))
    with np.errstate(divide="ignore", invalid="ignore"), _quiet():
        cosines = inner / (lengths[:, :, None] * lengths.T[None])
        mean: Floats = np.nanmean(np.where(np.isfinite(cosines), cosines, np.nan), axis=1)
    return mean


def lengths_of_directions(products: Products, i: int) -> Floats:
    """(G,): |u_i|, 1 where all batches of the task pull alike, about 1 / sqrt(n) where they have nothing in common."""
    lengths: Floats = np.sqrt(np.clip(products.projections[:, :, i].mean(axis=0), 0, None))
    return lengths


def negative_interference(values: Floats) -> Floats:
    """Mean over pairs i != j of max(0, -I[i, j]): (..., T, T) -> (...). Undefined pairs are left out."""
    apart = ~np.eye(values.shape[-1], dtype=bool)
    with _quiet():
        mean: Floats = np.nanmean(np.clip(-values[..., apart], 0, None), axis=-1)
    return mean


@contextmanager
def _quiet() -> Iterator[None]:
    """NumPy warns where a slice is all NaN; that result is NaN, as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
