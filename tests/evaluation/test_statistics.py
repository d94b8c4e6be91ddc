import math

import numpy as np
import pytest

from mixlora_cli.evaluation.statistics import bootstrap_means, percentile, wilson


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
    assert percentile(samples).low == pytest.approx(0.25, abs=1e-12)
    assert percentile(samples).high == pytest.approx(0.25, abs=1e-12)
    with pytest.raises(ValueError, match="units > 0"):
        bootstrap_means(np.empty((0, 1)), np.random.default_rng(0))
