"""Paired comparison of two models on the same instances: a difference, its 95 % interval, and a test.

0/1 scores: McNemar's exact test, and the interval of Bonett and Price (2012), which stays wide where few answers
differ; means of such scores over several trainings: what both become for them. Graded scores, MME and means over
benchmarks: a paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from mixlora_cli.evaluation.statistics import SEED, Z_95, Floats, Interval, bootstrap_means, percentile

RESAMPLES = 10_000
"""Of tests: the smallest p that a bootstrap can give is 2 / (RESAMPLES + 1)."""


@dataclass(frozen=True)
class Difference:
    """Second minus first, on the instances that both answered."""

    value: float
    interval: Interval
    p: float
    """Two-sided: how often so large a difference comes about if there is none."""
    test: str
    """How `p` was found."""


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: of the answers that differ, as many should be right on either side.

    `only_first`, `only_second`: instances that only the first or only the second model got right.
    """
    differing = only_first + only_second
    return 1.0 if differing == 0 else float(binomtest(only_first, differing, 0.5).pvalue)


def bonett_price(only_first: int, only_second: int, count: int) -> Interval:
    """Interval of a difference of paired proportions (Bonett and Price 2012, adjusted Wald), within [-1, 1].

    With a = (only_second + 1) / (n + 2) and b = (only_first + 1) / (n + 2):
    a - b -+ z sqrt((a + b - (a - b)^2) / (n + 2)).
    """
    gained, lost = (only_second + 1) / (count + 2), (only_first + 1) / (count + 2)
    half = Z_95 * np.sqrt((gained + lost - (gained - lost) ** 2) / (count + 2))
    return Interval(max(gained - lost - float(half), -1.0), min(gained - lost + float(half), 1.0))


def compare_right(first: Floats, second: Floats) -> Difference:
    """Marks 0 or 1 (n,) of both models on the same instances; in per cent."""
    only_first = int(((first == 1) & (second == 0)).sum())
    only_second = int(((first == 0) & (second == 1)).sum())
    count = len(first)
    interval = bonett_price(only_first, only_second, count).scaled(100)
    value = 100 * (only_second - only_first) / count
    return Difference(value, interval, mcnemar(only_first, only_second), "McNemar, exact")


def compare_right_over_seeds(by_seed: Sequence[Floats]) -> Difference:
    """Second minus first (n,) of marks 0 or 1, for each of several pairs of trainings, on the same instances.

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
    interval = Interval(max(center - half, -1.0), min(center + half, 1.0)).scaled(100)
    return Difference(100 * float(d.mean()), interval, _sign_flips(steps), name)


def _sign_flips(steps: NDArray[np.int64]) -> float:
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

    `differences`: (n_i,) second minus first of each unit of a group; units are drawn anew within groups.
    """
    rng = np.random.default_rng(SEED)
    factor = scale if total else scale / len(differences)
    samples = np.sum([bootstrap_means(each[:, None], rng, RESAMPLES)[:, 0] for each in differences], axis=0)
    value = factor * sum(float(each.mean()) for each in differences)
    return Difference(value, percentile(factor * samples), bootstrap_p(samples), "paired bootstrap")


def bootstrap_p(samples: Floats) -> float:
    """Two-sided p: twice the share of samples on the far side of zero; never below 2 / (samples + 1)."""
    below, above = int((samples <= 0).sum()), int((samples >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(samples) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) correction for having made several tests, in the given order."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


@dataclass(frozen=True)
class OverSeeds:
    """Mean of several trainings' scores; the interval says where the mean over all seeds lies."""

    value: float
    interval: Interval | None
    """None without a spread: of a single run, or where all have the same score."""
    n: int


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Mean and Student's t interval over seeds."""
    from scipy.stats import t

    count = len(values)
    if len(set(values)) == 1:
        return OverSeeds(values[0], None, count)
    mean = fmean(values)
    half = float(t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / count**0.5
    return OverSeeds(mean, Interval(mean - half, mean + half), count)


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
    return Difference(value, Interval(value - half, value + half), p, "Welch's t over seeds")
