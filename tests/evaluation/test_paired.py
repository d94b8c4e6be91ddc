"""Paired tests and intervals against values worked out by hand, by enumeration or by scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mixlora_cli.evaluation.paired import (
    RESAMPLES,
    bonett_price,
    bootstrap_p,
    compare_means,
    compare_right,
    compare_right_over_seeds,
    compare_seeds,
    holm,
    mcnemar,
    over_seeds,
    why_untested,
)


def test_mcnemar_counts_every_way_the_differing_answers_could_have_fallen() -> None:
    ways = list(itertools.product((0, 1), repeat=10))
    as_uneven = sum(abs(sum(way) - 5) >= 3 for way in ways)  # 8 of 10 on one side, or more
    assert mcnemar(8, 2) == mcnemar(2, 8) == pytest.approx(as_uneven / len(ways))
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)


def test_bonett_price_solves_its_equation() -> None:
    interval = bonett_price(only_first=3, only_second=14, count=50)
    gained, lost = 15 / 52, 4 / 52
    half = 1.959963984540054 * math.sqrt((gained + lost - (gained - lost) ** 2) / 52)
    assert (interval.low, interval.high) == pytest.approx((11 / 52 - half, 11 / 52 + half))
    same = bonett_price(0, 0, 50)
    assert same.low == -same.high < 0  # no differing answer is no certainty
    assert bonett_price(0, 2, 2).high <= 1.0


def test_right_and_wrong_answers() -> None:
    first = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0.0])
    second = np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 0.0])
    found = compare_right(first, second)
    assert found.value == pytest.approx(50.0)
    assert found.p == pytest.approx(mcnemar(1, 6)) == pytest.approx(0.125)
    assert found.interval.low < 50 < found.interval.high
    assert compare_right(first, first).p == 1.0


def test_right_and_wrong_answers_of_one_pair_of_trainings_are_mcnemars() -> None:
    draw = np.random.default_rng(1)
    for _ in range(5):
        first, second = draw.integers(0, 2, (2, 40)).astype(float)
        one, usual = compare_right_over_seeds([second - first]), compare_right(first, second)
        assert (one.value, one.p) == (pytest.approx(usual.value), pytest.approx(usual.p))
        assert (one.interval.low, one.interval.high) == (
            pytest.approx(usual.interval.low),
            pytest.approx(usual.interval.high),
        )
        assert one.test == usual.test


def test_right_and_wrong_answers_of_several_pairs_by_enumeration() -> None:
    by_seed = [
        np.array([1, 0, 1, 0, -1, 0.0]),
        np.array([1, 1, 0, 0, 0, 0.0]),
        np.array([1, 0, 0, 0, -1, 0.0]),
    ]
    found = compare_right_over_seeds(by_seed)
    sums = np.sum(by_seed, axis=0)  # 3, 1, 1, 0, -2, 0
    flipped = [
        abs(sum(s * x for s, x in zip(signs, sums, strict=True)))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    assert found.p == pytest.approx(np.mean([each >= abs(sums.sum()) for each in flipped]))
    assert found.value == pytest.approx(100 * sums.sum() / 3 / 6)
    assert found.interval.low < found.value < found.interval.high


def test_answers_that_never_differ_leave_room_for_others() -> None:
    """A bootstrap of nothing but zeros would be certain."""
    found = compare_right_over_seeds([np.zeros(120)] * 3)
    assert (found.value, found.p) == (0.0, 1.0)
    assert (found.interval.low, found.interval.high) == pytest.approx((-2.27, 2.27), abs=0.01)


def test_bootstrap_of_paired_differences_against_the_t_test() -> None:
    rng = np.random.default_rng(0)
    differences = rng.choice([-0.3, 0.0, 0.3, 0.6], size=200)
    found = compare_means([differences], 100)
    expected = stats.ttest_1samp(differences, 0)
    low, high = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(100 * differences.mean())
    assert (found.interval.low, found.interval.high) == pytest.approx((100 * low, 100 * high), abs=0.6)
    assert found.p == pytest.approx(
        2 / (RESAMPLES + 1)
    )  # as small as it can be; the t test says less than 1e-4
    assert expected.pvalue < 1e-4
    slight = np.r_[differences - differences.mean() + 0.02]
    assert compare_means([slight], 100).p == pytest.approx(stats.ttest_1samp(slight, 0).pvalue, abs=0.03)


def test_groups_count_equally_and_totals_add_up() -> None:
    groups = [np.array([1.0, 1.0, 0.0, 0.0]), np.zeros(100)]
    assert compare_means(groups, 100).value == pytest.approx(25.0)
    assert compare_means(groups, 100, total=True).value == pytest.approx(50.0)


def test_no_difference_at_all_has_p_one() -> None:
    assert compare_means([np.zeros(30)], 100).p == 1.0
    assert bootstrap_p(np.array([-1.0, 1.0])) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_seeds() -> None:
    side = over_seeds([60.0, 62.0, 64.0])
    assert side.value == 62.0
    assert side.interval is not None
    assert side.interval.high - 62.0 == pytest.approx(4.302652729911275 * 2 / math.sqrt(3))  # t(0.975, 2)
    assert over_seeds([60.0]).interval is None
    found = compare_seeds([60.0, 62.0, 64.0], [66.0, 67.0, 70.0])
    assert found is not None
    assert found.value == pytest.approx(67 + 2 / 3 - 62)
    assert found.p == pytest.approx(stats.ttest_ind([66, 67, 70], [60, 62, 64], equal_var=False).pvalue)
    assert found.interval.low < found.value < found.interval.high
    assert compare_seeds([60.0], [66.0, 67.0]) is None
    low, high = stats.ttest_ind([66, 67, 70], [60, 62, 64], equal_var=False).confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high))


def test_seeds_without_a_spread_have_no_test_and_no_interval() -> None:
    assert over_seeds([10.0, 10.0]).interval is None
    assert compare_seeds([10.0, 10.0], [12.0, 12.0]) is None
    assert why_untested([10.0, 10.0], [12.0, 12.0]) == "no spread over seeds"
    assert why_untested([10.0], [12.0, 13.0]) == "single run on one side"
    # A spread on one side is enough: standard error 1, one degree of freedom, where t's tail is arctan's.
    found = compare_seeds([10.0, 10.0], [11.0, 13.0])
    assert found is not None
    assert found.p == pytest.approx(2 * (0.5 - math.atan(2) / math.pi))
    assert found.interval.high == pytest.approx(2 + math.tan(0.475 * math.pi))
    assert why_untested([10.0, 10.0], [11.0, 13.0]) == ""
