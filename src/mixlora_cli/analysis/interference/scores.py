"""Interference scores (Eq. 3) out of the products of the second pass, and how far they can be trusted.

With p_bj = u_j . g_b / |g_b| for batch b of task i, the ratio of Eq. 3 is (u_j . g_b) / (u_i . g_b) = p_bj / p_bi.
Indices: batch b (n), group g (G), task j (T), bootstrap sample s (R).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixlora_cli.analysis.interference.gradients import MATRICES, Floats, Group, Products
from mixlora_cli.config import Variant

RESAMPLES = 1_000
_SEED, _PAIRS_SEED = 20_240, 4_210
VARIANTS: tuple[Variant, ...] = ("mean", "median", "ratio_of_means", "cosine")


@dataclass(frozen=True)
class Measurement:
    """All products of a run, or those of some of its groups."""

    tasks: tuple[str, ...]
    groups: tuple[Group, ...]
    products: tuple[Products, ...]
    """By task i, whose batches they are of."""

    def only(self, chosen: Sequence[bool]) -> Measurement:
        keep = np.flatnonzero(np.array(chosen, dtype=bool))
        parts = (Products(p.projections[:, keep], p.norms[:, keep]) for p in self.products)
        return replace(self, groups=tuple(self.groups[k] for k in keep), products=tuple(parts))

    def of(self, **wanted: Any) -> Measurement:
        """The groups of this `matrix`, `block` or layer `number`."""
        return self.only(
            [all(getattr(g, key) == value for key, value in wanted.items()) for g in self.groups]
        )

    def by_matrix(self) -> dict[str, Measurement]:
        """The groups of A and of B, where it has any."""
        parts = {matrix: self.of(matrix=matrix) for matrix in MATRICES}
        return {matrix: part for matrix, part in parts.items() if part.groups}


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

    The variants beside the mean are moved less by small denominators.
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
    """(R, T); a batch without any defined ratio is left out (and counted by `count_denominators`)."""
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


def negative_interference(values: Floats) -> Floats:
    """Mean over pairs i != j of max(0, -I[i, j]): (..., T, T) -> (...). Undefined pairs are left out."""
    return _mean_negative(_off_diagonal(values))


def _off_diagonal(values: Floats) -> Floats:
    """(..., T, T) -> (..., T (T - 1))."""
    apart: Floats = values[..., ~np.eye(values.shape[-1], dtype=bool)]
    return apart


def _mean_negative(pairs: Floats) -> Floats:
    with _quiet():
        mean: Floats = np.nanmean(np.clip(-pairs, 0, None), axis=-1)
    return mean


@contextmanager
def _quiet() -> Iterator[None]:
    """NumPy warns where a slice is all NaN; that result is NaN, as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def averages(measurement: Measurement) -> dict[str, dict[str, Scores]]:
    """For A and B, every variant with its bootstrap, over all groups."""
    return {
        matrix: {v: score(part, v, resample=True) for v in VARIANTS}
        for matrix, part in measurement.by_matrix().items()
    }


def summarise(
    measurement: Measurement, average: Mapping[str, Mapping[str, Scores]], near_zero: float
) -> dict[str, Any]:
    """What `interference.json` says of the measurement, averaged as in Figures 2 and 7; null where not defined.

    Args:
        average: of `averages`.
        near_zero: cosine below which a denominator counts as near zero.
    """
    blocks = dict.fromkeys(group.block for group in measurement.groups)
    layers = dict.fromkeys((group.number, group.block) for group in measurement.groups)
    return {
        "tasks": list(measurement.tasks),
        "batches": {t: len(p.norms) for t, p in zip(measurement.tasks, measurement.products, strict=True)},
        "average": {matrix: {v: _plain(s) for v, s in by.items()} for matrix, by in average.items()},
        "blocks": {
            block: {
                matrix: {v: _plain(s) for v, s in by.items()}
                for matrix, by in averages(measurement.of(block=block)).items()
            }
            for block in blocks
        },
        "layers": [
            {
                "layer": number,
                "block": block,
                "matrix": matrix,
                **{v: _plain(score(part, v, resample=v == "mean")) for v in VARIANTS},
            }
            for number, block in layers
            for matrix, part in measurement.of(block=block, number=number).by_matrix().items()
        ],
        "negative": {
            matrix: {v: _negative(scores) for v, scores in by.items()} for matrix, by in average.items()
        },
        "denominators": {
            matrix: {"near_zero": near_zero, "tasks": count_denominators(part, near_zero)}
            for matrix, part in measurement.by_matrix().items()
        },
    }


def _plain(scores: Scores) -> dict[str, Any]:
    parts = {"value": scores.value, **dict(zip(("low", "high"), scores.interval() or (), strict=False))}
    return {name: [[_number(value) for value in row] for row in part] for name, part in parts.items()}


def _number(value: Any) -> float | None:
    """A float for JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


def _negative(scores: Scores) -> dict[str, Any]:
    """Mean negative part over pairs of tasks, with its interval, and how many pairs are negative."""
    apart = _off_diagonal(scores.value)
    found: dict[str, Any] = {"value": _number(negative_interference(scores.value))}
    if scores.samples is not None:
        low, high = np.nanpercentile(negative_interference(scores.samples), (2.5, 97.5))
        found |= {"low": _number(low), "high": _number(high)}
    return {**found, "negative_pairs": int((apart < 0).sum()), "pairs": int(np.isfinite(apart).sum())}


def count_denominators(measurement: Measurement, near_zero: float) -> list[dict[str, Any]]:
    """How far each task's denominators u_i . g_b can be trusted; nothing but the undefined is left out of a score.

    - zero_gradients: the batch has no gradient there at all.
    - undefined: exactly zero, so no ratio. Zero gradients are among them.
    - near_zero: not zero, but the cosine of u_i and g_b is below the threshold: the ratio is kept and may be huge.
    - negative: the batch pulls against its own task's mean direction: its ratios have the other sign.
    - coherence: mean cosine between two different batches of the task, 1 = all alike, 0 = nothing in common.
    - own_share: median share of a denominator that is the batch's own contribution to u_i, 1 = nothing but itself.
    """
    return [_count(measurement, i, near_zero) for i in range(len(measurement.tasks))]


def _count(measurement: Measurement, i: int, near_zero: float) -> dict[str, Any]:
    products = measurement.products[i]
    n = len(products.norms)
    own = products.projections[:, :, i]
    # |u_i| by group: 1 where all batches pull alike, about 1 / sqrt(n) where they have nothing in common.
    lengths = np.sqrt(np.clip(own.mean(axis=0), 0, None))
    defined = own != 0
    pulled = lengths > 0
    coherence = (n * lengths[pulled] ** 2 - 1) / (n - 1)
    return {
        "task": measurement.tasks[i],
        "batches": n,
        "total": own.size,
        "zero_gradients": int((products.norms == 0).sum()),
        "undefined": int((~defined).sum()),
        "near_zero": int((defined & (np.abs(own) < near_zero * lengths)).sum()),
        "negative": int((own < 0).sum()),
        "coherence": float(coherence.mean()) if pulled.any() else None,
        "own_share": float(np.median(1 / (n * own[defined]))) if defined.any() else None,
    }


def compare_scores(
    ours: Mapping[str, Mapping[str, Scores]], theirs: Mapping[str, Mapping[str, Scores]]
) -> dict[str, dict[str, Any]]:
    """For A and B and each variant: negative interference of both adapters, and what of it has gone.

    Args:
        ours: of `averages`, of the adapter that is measured.
        theirs: the same of the adapter that it is compared with.
    """
    return {
        matrix: {variant: _removed(scores, theirs[matrix][variant]) for variant, scores in by.items()}
        for matrix, by in ours.items()
        if matrix in theirs
    }


def _removed(ours: Scores, theirs: Scores) -> dict[str, Any]:
    """`removed` is 1 - ours / theirs; below 0 where there is more than before, null where there was none.

    Two intervals: over batches (these pairs of tasks, other instances), and over batches and pairs of tasks together
    (other tasks too). Both adapters get the same draws.
    """
    before, after = negative_interference(theirs.value), negative_interference(ours.value)
    found: dict[str, Any] = {
        "before": _number(before),
        "after": _number(after),
        "difference": _number(before - after),
        "removed": _number(_share(before, after)),
    }
    if ours.samples is None or theirs.samples is None:
        return found
    pairs = [_off_diagonal(samples) for samples in (theirs.samples, ours.samples)]  # (R, T (T - 1)) each
    drawn = np.random.default_rng(_PAIRS_SEED).integers(pairs[0].shape[1], size=pairs[0].shape)
    both = [np.take_along_axis(each, drawn, axis=1) for each in pairs]
    for name, samples in {"batches": pairs, "batches_and_pairs": both}.items():
        b, a = map(_mean_negative, samples)
        found[f"difference_over_{name}"] = _interval(b - a)
        found[f"removed_over_{name}"] = _interval(_share(b, a))
    return found


def _share(before: Floats, after: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        share: Floats = np.where(before > 0, 1 - after / before, np.nan)
    return share


def _interval(samples: Floats) -> list[float] | None:
    defined = samples[np.isfinite(samples)]
    return [float(end) for end in np.percentile(defined, (2.5, 97.5))] if len(defined) else None
