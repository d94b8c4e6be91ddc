"""Numbers with their 95 % intervals: proportions, bootstraps, means over seeds, and differences with a test.

0/1 scores: Wilson's interval; of a difference McNemar's exact test, and the interval of Bonett and Price (2012), which
stays wide where few answers differ; means of such scores over several trainings: what both become for them. Graded
scores, sums, means over benchmarks and losses per token: a seeded percentile bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
RESAMPLES = 2_000
TEST_RESAMPLES = 10_000
"""Of tests: the smallest p that a bootstrap can give is 2 / (TEST_RESAMPLES + 1)."""
SEED = 20_240
_DRAWN_AT_ONCE = 1 << 24
"""Counts that a bootstrap holds at once: 128 MB."""
ABSENT = "-"


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its 95 % interval, all in one unit.

    None is a number that the data do not tell: both ends of the mean of several equal values, the upper end of a ratio
    whose divisor may be zero.
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    def scaled(self, factor: float) -> Estimate:
        """All three times `factor` (100 turns a proportion into per cent)."""
        return Estimate(
            *(None if part is None else part * factor for part in (self.value, self.low, self.high))
        )

    def interval_text(self, digits: int = 1) -> str:
        """`[61.2, 66.9]`; `[-]` where neither end is known."""
        if self.low is None and self.high is None:
            return f"[{ABSENT}]"
        return f"[{number_text(self.low, digits)}, {number_text(self.high, digits)}]"

    def text(self, digits: int = 1, between: str = " ") -> str:
        """`64.0 [61.2, 66.9]`, with `between` where a line could break; a count, which does not vary, alone."""
        value = number_text(self.value, digits)
        if self.low == self.high == self.value:
            return value
        return f"{value}{between}{self.interval_text(digits)}"


def number_text(value: float | None, digits: int = 1) -> str:
    """The number with so many decimals; `-` for None."""
    return ABSENT if value is None else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """Second minus first, on the instances that both answered."""

    value: float
    low: float
    high: float
    """Ends of the 95 % interval."""
    p: float
    """Two-sided: how often so large a difference comes about if there is none."""
    test: str
    """How `p` was found."""


def wilson(successes: int, trials: int) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927), within [0, 1].

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) with p = successes / trials.

    Raises:
        ValueError: unless 0 <= successes <= trials and trials > 0.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"wilson: {successes} of {trials} is no proportion")
    share = successes / trials
    weight = 1 + Z_95**2 / trials
    centre = (share + Z_95**2 / (2 * trials)) / weight
    half = Z_95 * math.sqrt(share * (1 - share) / trials + Z_95**2 / (4 * trials**2)) / weight
    # At 0 and at n the formula gives exactly 0 and 1; rounding may miss them by 1e-17.
    low, high = 0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half
    return Estimate(share, low, high)


def bootstrap_means(values: Floats, rng: np.random.Generator, resamples: int = RESAMPLES) -> Floats:
    """Means of `resamples` samples of the rows of `values` (units, numbers), drawn with replacement:
    (resamples, numbers).

    Rows that are equal are drawn together: how often each distinct row occurs among n draws is multinomial,
    which is the same distribution as drawing n indices and costs the number of distinct rows instead of n.

    Raises:
        ValueError: `values` has another shape, or no units.
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
    at_once = max(_DRAWN_AT_ONCE // len(rows), 1)
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    drawn = (rng.multinomial(total, counts / total, size=size) for size in sizes)
    means: Floats = np.concatenate([each @ rows / total for each in drawn])
    return means


def bootstrap_ratios(pairs: Floats, rng: np.random.Generator, resamples: int = RESAMPLES) -> Floats:
    """Of `resamples` samples of pairs (units, 2) the sum of the first numbers over that of the second: (resamples,)."""
    above, below = bootstrap_means(pairs, rng, resamples).T
    return np.asarray(above / below)


def percentile(value: float, samples: Floats) -> Estimate:
    """A value with the central 95 % of its bootstrap samples (resamples,)."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def ratio_of_medians(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Median of `above` over that of `below`, measured in pairs, with a percentile bootstrap over the pairs.

    Unknown (None) where the lower median is not positive, with no upper end where that is possible.
    """
    pairs = np.asarray([above, below], dtype=np.float64)
    drawn = np.random.default_rng(SEED).integers(0, pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))
    value, samples = (_quotient(np.median(each, axis=-1)) for each in (pairs, pairs[:, drawn]))
    # Infinities have no place between them: take ends that occurred.
    low = float(np.percentile(samples, 2.5, method="lower"))
    high = float(np.percentile(samples, 97.5, method="higher"))
    return Estimate(*(end if math.isfinite(end) else None for end in (float(value), low, high)))


def _quotient(medians: Floats) -> Floats:
    """First row over second; infinite where that is not positive."""
    above, below = medians
    quotient: Floats = np.where(below > 0, above / np.where(below > 0, below, 1.0), np.inf)
    return quotient


def bootstrap_p(samples: Floats) -> float:
    """Two-sided p: twice the share of samples on the far side of zero; never below 2 / (samples + 1)."""
    below, above = int((samples <= 0).sum()), int((samples >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(samples) + 1))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: of the answers that differ, as many should be right on either side.

    `only_first`, `only_second`: instances that only the first or only the second model got right.
    """
    from scipy.stats import binomtest

    differing = only_first + only_second
    return 1.0 if differing == 0 else float(binomtest(only_first, differing, 0.5).pvalue)


def bonett_price(only_first: int, only_second: int, count: int) -> tuple[float, float]:
    """Interval of a difference of paired proportions (Bonett and Price 2012, adjusted Wald), within [-1, 1].

    With a = (only_second + 1) / (n + 2) and b = (only_first + 1) / (n + 2):
    a - b -+ z sqrt((a + b - (a - b)^2) / (n + 2)).
    """
    gained, lost = (only_second + 1) / (count + 2), (only_first + 1) / (count + 2)
    half = Z_95 * np.sqrt((gained + lost - (gained - lost) ** 2) / (count + 2))
    return max(gained - lost - float(half), -1.0), min(gained - lost + float(half), 1.0)


def compare_right(first: Floats, second: Floats) -> Difference:
    """Scores 0 or 1 (n,) of both models on the same instances; in per cent."""
    only_first = int(((first == 1) & (second == 0)).sum())
    only_second = int(((first == 0) & (second == 1)).sum())
    count = len(first)
    low, high = bonett_price(only_first, only_second, count)
    value = 100 * (only_second - only_first) / count
    return Difference(value, 100 * low, 100 * high, mcnemar(only_first, only_second), "McNemar, exact")


def compare_right_over_seeds(by_seed: Sequence[Floats]) -> Difference:
    """Second minus first (n,) of scores 0 or 1, for each of several pairs of trainings, on the same instances.

    In per cent.

    Their mean d over the pairs is tested by flipping the signs of instances: how often is |sum of +-d| as large as it
    is. All sums are counted, none is drawn. The interval is Bonett and Price's for such d: that of a mean with the two
    instances 1 and -1 added. With one pair both are McNemar's and theirs.
    """
    name = "sign flips, exact" if len(by_seed) > 1 else "McNemar, exact"
    steps = np.rint(np.sum(by_seed, axis=0)).astype(np.int64)  # multiples of 1 / pairs, as integers
    d = steps / len(by_seed)
    padded = np.append(d, [1.0, -1.0])
    half = Z_95 * float(np.sqrt(padded.var() / len(padded)))
    center = float(padded.mean())
    low, high = 100 * max(center - half, -1.0), 100 * min(center + half, 1.0)
    return Difference(100 * float(d.mean()), low, high, _sign_flips(steps), name)


def _sign_flips(steps: Integers) -> float:
    """Two-sided p of a sum of integers whose signs are as likely + as -."""
    reach = int(np.abs(steps).sum())
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0  # index - reach is the sum
    for step in np.abs(steps[steps != 0]):
        chances = (np.roll(chances, step) + np.roll(chances, -step)) / 2
    sums = np.abs(np.arange(-reach, reach + 1))
    return float(min(1.0, chances[sums >= abs(int(steps.sum()))].sum()))


def compare_means(differences: Sequence[Floats], scale: float, total: bool = False) -> Difference:
    """Mean over groups (benchmarks, tasks) of the mean difference within each, or their sum (MME's subtasks).

    `differences`: of a group's units second minus first (n_i,), or (n_i, 2) with what each weighs: then the group's
    mean is the sum of the first numbers over that of the second. Units are drawn anew within groups. Where none
    differs, no draw does either: there the interval is Bonett and Price's for all units together.
    """
    factor = scale if total else scale / len(differences)
    if not any(np.any(each if each.ndim == 1 else each[:, 0]) for each in differences):
        low, high = bonett_price(0, 0, sum(map(len, differences)))
        whole = factor * len(differences)
        return Difference(0.0, whole * low, whole * high, 1.0, "paired bootstrap")
    rng = np.random.default_rng(SEED)
    samples = np.sum(
        [
            bootstrap_means(each[:, None], rng, TEST_RESAMPLES)[:, 0]
            if each.ndim == 1
            else bootstrap_ratios(each, rng, TEST_RESAMPLES)
            for each in differences
        ],
        axis=0,
    )
    value = factor * sum(
        float(each.mean() if each.ndim == 1 else each[:, 0].sum() / each[:, 1].sum()) for each in differences
    )
    low, high = np.percentile(factor * samples, (2.5, 97.5))
    return Difference(value, float(low), float(high), bootstrap_p(samples), "paired bootstrap")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) correction for having made several tests, in the given order."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of several trainings' scores with Student's t interval; no ends without a spread."""
    from scipy.stats import t

    count = len(values)
    if len(set(values)) == 1:
        return Estimate(values[0])
    mean = fmean(values)
    half = float(t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / count**0.5
    return Estimate(mean, mean - half, mean + half)


def why_untested(first: Sequence[float], second: Sequence[float]) -> str:
    """Why a difference of means over seeds has neither test nor interval; "" where it has both."""
    if min(len(first), len(second)) < 2:
        return "single run on one side"
    if len(set(first)) == len(set(second)) == 1:
        return "no spread over seeds"
    return ""


def compare_seeds(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """Difference of means over seeds by Welch's t test; None where `why_untested` gives a reason.

    t = (mean2 - mean1) / sqrt(v1 + v2) with v = s^2 / n of each side, on
    (v1 + v2)^2 / (v1^2 / (n1 - 1) + v2^2 / (n2 - 1)) degrees of freedom (Welch 1947).
    """
    from scipy.stats import t

    if why_untested(first, second):
        return None
    value = fmean(second) - fmean(first)
    # Not scipy's ttest_ind: it warns of lost precision where one side has no spread.
    v1, v2 = (float(np.var(side, ddof=1)) / len(side) for side in (first, second))
    freedom = (v1 + v2) ** 2 / (v1**2 / (len(first) - 1) + v2**2 / (len(second) - 1))
    error = (v1 + v2) ** 0.5
    half = float(t.ppf(0.975, freedom)) * error
    p = 2 * float(t.sf(abs(value) / error, freedom))
    return Difference(value, value - half, value + half, p, "Welch's t over seeds")


def compare_same_seeds(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """Mean difference of trainings that share their seeds, and so their order of instances, by Student's paired t.

    Values of the same seeds in the same order; None with fewer than two, or where all differences are the same.
    """
    from scipy.stats import ttest_rel

    if len({round(after - before, 9) for before, after in zip(first, second, strict=True)}) < 2:
        return None
    found = ttest_rel(second, first)
    ends = found.confidence_interval(0.95)
    value = fmean(second) - fmean(first)
    return Difference(value, float(ends.low), float(ends.high), float(found.pvalue), "paired t, seed by seed")
