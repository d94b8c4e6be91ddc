"""Intervals, bootstraps and tests against values worked out by hand, by enumeration or by scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mixlora_cli.stats import (
    TEST_RESAMPLES,
    Estimate,
    bonett_price,
    bootstrap_means,
    bootstrap_p,
    bootstrap_ratios,
    compare_means,
    compare_right,
    compare_right_over_seeds,
    compare_same_seeds,
    compare_seeds,
    holm,
    mcnemar,
    over_seeds,
    percentile,
    why_untested,
    wilson,
)


def test_wilson_equals_published_values() -> None:
    # 81 of 263: Newcombe (1998), Table I, method 3.
    interval = wilson(81, 263)
    assert interval.low == pytest.approx(0.2553, abs=5e-5)
    assert interval.high == pytest.approx(0.3662, abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(1, 7), (5, 10), (99, 100)])
def test_wilson_ends_solve_its_equation(successes: int, trials: int) -> None:
    """Each end p satisfies |share - p| = z sqrt(p (1 - p) / n)."""
    share, z = successes / trials, 1.959963984540054
    for end in (wilson(successes, trials).low, wilson(successes, trials).high):
        assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / trials), rel=1e-9)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 20).low == 0.0
    assert wilson(20, 20).high == 1.0
    assert wilson(0, 20).high == pytest.approx(1 - wilson(20, 20).low, abs=1e-12)
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson(successes, trials)


def test_bootstrap_has_the_distribution_of_drawing_rows() -> None:
    values = np.array([[0.0, 0.0], [0.5, 0.0], [1.0, 1.0], [1.0, 1.0], [0.5, 0.0], [0.0, 0.0], [1.0, 1.0]])
    fast = bootstrap_means(values, np.random.default_rng(1), resamples=20_000)
    slow_rng = np.random.default_rng(2)
    slow = np.array([values[slow_rng.integers(7, size=7)].mean(axis=0) for _ in range(20_000)])
    assert fast.shape == (20_000, 2)
    # Standard errors over 20,000 draws are below 0.0015 for means and deviations alike.
    np.testing.assert_allclose(fast.mean(axis=0), slow.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(np.cov(fast.T), np.cov(slow.T), atol=0.002)
    np.testing.assert_allclose(
        np.percentile(fast.sum(axis=1), (2.5, 50, 97.5)),
        np.percentile(slow.sum(axis=1), (2.5, 50, 97.5)),
        atol=0.08,
    )


def test_bootstrap_is_repeatable_and_ignores_the_order_of_units() -> None:
    values = np.random.default_rng(3).integers(0, 4, size=(50, 1)) / 3
    first = bootstrap_means(values, np.random.default_rng(5), resamples=100)
    again = bootstrap_means(values[::-1], np.random.default_rng(5), resamples=100)
    np.testing.assert_array_equal(first, again)


def test_bootstrap_of_equal_units_has_no_width() -> None:
    samples = bootstrap_means(np.full((9, 1), 0.25), np.random.default_rng(0))[:, 0]
    assert percentile(0.25, samples).low == pytest.approx(0.25, abs=1e-12)
    assert percentile(0.25, samples).high == pytest.approx(0.25, abs=1e-12)
    with pytest.raises(ValueError, match="units > 0"):
        bootstrap_means(np.empty((0, 1)), np.random.default_rng(0))


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
    assert interval == pytest.approx((11 / 52 - half, 11 / 52 + half))
    low, high = bonett_price(0, 0, 50)
    assert low == -high < 0  # no differing answer is no certainty
    assert bonett_price(0, 2, 2)[1] <= 1.0


def test_right_and_wrong_answers() -> None:
    first = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0.0])
    second = np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 0.0])
    found = compare_right(first, second)
    assert found.value == pytest.approx(50.0)
    assert found.p == pytest.approx(mcnemar(1, 6)) == pytest.approx(0.125)
    assert found.low < 50 < found.high
    assert compare_right(first, first).p == 1.0


def test_right_and_wrong_answers_of_one_pair_of_trainings_are_mcnemars() -> None:
    draw = np.random.default_rng(1)
    for _ in range(5):
        first, second = draw.integers(0, 2, (2, 40)).astype(float)
        one, usual = compare_right_over_seeds([second - first]), compare_right(first, second)
        assert (one.value, one.p) == (pytest.approx(usual.value), pytest.approx(usual.p))
        assert (one.low, one.high) == (
            pytest.approx(usual.low),
            pytest.approx(usual.high),
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
    assert found.low < found.value < found.high


def test_answers_that_never_differ_leave_room_for_others() -> None:
    """A bootstrap of nothing but zeros would be certain."""
    found = compare_right_over_seeds([np.zeros(120)] * 3)
    assert (found.value, found.p) == (0.0, 1.0)
    assert (found.low, found.high) == pytest.approx((-2.27, 2.27), abs=0.01)


@pytest.mark.parametrize("total", [False, True])
def test_means_of_equal_scores_are_equal_within_what_so_few_can_tell(total: bool) -> None:
    equal = [np.zeros(10), np.array([[0.0, 2.0]] * 10)]
    found, (low, high) = compare_means(equal, 100, total), bonett_price(0, 0, 20)
    groups = 2 if total else 1
    assert (found.value, found.p) == (0.0, 1.0)
    assert (found.low, found.high) == pytest.approx((100 * groups * low, 100 * groups * high))
    assert found.high > 10


def test_bootstrap_of_paired_differences_against_the_t_test() -> None:
    rng = np.random.default_rng(0)
    differences = rng.choice([-0.3, 0.0, 0.3, 0.6], size=200)
    found = compare_means([differences], 100)
    expected = stats.ttest_1samp(differences, 0)
    low, high = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(100 * differences.mean())
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high), abs=0.6)
    assert found.p == pytest.approx(
        2 / (TEST_RESAMPLES + 1)
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
    assert side.high is not None
    assert side.high - 62.0 == pytest.approx(4.302652729911275 * 2 / math.sqrt(3))  # t(0.975, 2)
    assert over_seeds([60.0]) == Estimate(60.0)
    found = compare_seeds([60.0, 62.0, 64.0], [66.0, 67.0, 70.0])
    assert found is not None
    assert found.value == pytest.approx(67 + 2 / 3 - 62)
    assert found.p == pytest.approx(stats.ttest_ind([66, 67, 70], [60, 62, 64], equal_var=False).pvalue)
    assert found.low < found.value < found.high
    assert compare_seeds([60.0], [66.0, 67.0]) is None
    low, high = stats.ttest_ind([66, 67, 70], [60, 62, 64], equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_seeds_without_a_spread_have_no_test_and_no_interval() -> None:
    assert over_seeds([10.0, 10.0]) == Estimate(10.0)
    assert compare_seeds([10.0, 10.0], [12.0, 12.0]) is None
    assert why_untested([10.0, 10.0], [12.0, 12.0]) == "no spread over seeds"
    assert why_untested([10.0], [12.0, 13.0]) == "single run on one side"
    # A spread on one side is enough: standard error 1, one degree of freedom, where t's tail is arctan's.
    found = compare_seeds([10.0, 10.0], [11.0, 13.0])
    assert found is not None
    assert found.p == pytest.approx(2 * (0.5 - math.atan(2) / math.pi))
    assert found.high == pytest.approx(2 + math.tan(0.475 * math.pi))
    assert why_untested([10.0, 10.0], [11.0, 13.0]) == ""


def test_seed_by_seed_what_the_seeds_share_cancels() -> None:
    first, second = [60.0, 70.0, 80.0], [61.0, 72.0, 83.0]
    found = compare_same_seeds(first, second)
    assert found is not None
    # Differences 1, 2, 3: standard error 1 / sqrt(3) on two degrees of freedom, where t's tail is algebraic.
    t = 2 * math.sqrt(3)
    assert (found.value, found.p) == pytest.approx((2.0, 1 - t / math.sqrt(2 + t * t)))
    assert (found.low, found.high) == pytest.approx(
        (2 - 4.302652729911275 / math.sqrt(3), 2 + 4.302652729911275 / math.sqrt(3))
    )
    over = compare_seeds(first, second)
    assert over is not None and over.value == pytest.approx(2.0) and over.low < -10
    assert compare_same_seeds([60.0], [61.0]) is None
    assert compare_same_seeds([60.0, 70.0], [61.0, 71.0]) is None


def test_a_bootstrap_in_pieces_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=(30, 2))
    whole = bootstrap_means(values, np.random.default_rng(2), 100)
    monkeypatch.setattr("mixlora_cli.stats._DRAWN_AT_ONCE", 30 * 7)
    pieces = bootstrap_means(values, np.random.default_rng(2), 100)
    np.testing.assert_allclose(pieces, whole, rtol=1e-12)


def test_ratios_have_the_spread_of_their_linearisation() -> None:
    """Cochran's (1977) variance of a ratio of sums: that of y - R x over n times the mean of x squared."""
    generator = np.random.default_rng(0)
    x = generator.integers(1, 9, size=400).astype(float)
    y = 0.7 * x + generator.normal(size=400)
    samples = bootstrap_ratios(np.column_stack([y, x]), np.random.default_rng(3), 10_000)
    ratio = y.sum() / x.sum()
    error = (y - ratio * x).std() / (len(x) ** 0.5 * x.mean())
    assert samples.shape == (10_000,)
    assert samples.mean() == pytest.approx(ratio, abs=0.05 * error)
    assert samples.std() == pytest.approx(error, rel=0.05)
    assert samples.std() < 0.8 * np.std(y) / (len(x) ** 0.5 * x.mean())  # not that of y with x held


def test_weighted_differences_are_ratios_and_equal_weights_change_nothing() -> None:
    generator = np.random.default_rng(0)
    groups = [generator.normal(0.3, 1, size=size) for size in (40, 25)]
    plain = compare_means(groups, 1)
    weighted = compare_means([np.column_stack([each, np.ones_like(each)]) for each in groups], 1)
    ends = weighted.value, weighted.low, weighted.high, weighted.p
    assert ends == pytest.approx((plain.value, plain.low, plain.high, plain.p))
    pairs = np.array([[1.0, 1], [2, 8], [-3, 2]])
    assert compare_means([pairs, groups[0]], 1).value == pytest.approx((0 / 11 + groups[0].mean()) / 2)
