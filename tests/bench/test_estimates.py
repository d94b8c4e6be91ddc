"""Ratios of medians and of differences, against numbers worked out by hand."""

import numpy as np
import pytest

from mixlora_cli.analysis.bench.estimates import Estimate, extra, ratio, ratio_of_extras, spread

LINEAR = [1.0, 2.0, 1.5, 4.0, 1.2]


def plus(seconds: float) -> list[float]:
    """Always so much slower than the linear layer in the same round."""
    return [time + seconds for time in LINEAR]


def test_spread() -> None:
    one = spread([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (one.median, one.lower_quartile, one.upper_quartile, one.rounds) == (3.0, 2.0, 4.0, 5)


def test_what_slows_a_whole_round_cancels() -> None:
    assert extra(plus(0.25), LINEAR).value == pytest.approx(0.25)
    found = ratio_of_extras(plus(0.25), plus(0.5), LINEAR)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_ratio_is_that_of_the_medians() -> None:
    assert ratio([1.0, 9.0, 2.0], [4.0, 1.0, 8.0]).value == 0.5


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        above, below = rng.normal(6.0, 0.5, 20), rng.normal(5.0, 0.5, 20)
        found = ratio(list(above), list(below))
        assert found.low is not None and found.high is not None
        hits += found.low <= 1.2 <= found.high
    assert 53 <= hits <= 60


def test_no_ratio_where_lora_is_no_slower_than_the_linear_layer() -> None:
    assert ratio_of_extras(plus(0.1), plus(-0.1), LINEAR) == Estimate(None, None, None)


def test_no_upper_end_where_that_may_be() -> None:
    lora = [LINEAR[0] - 1, LINEAR[1] - 1, *plus(1.0)[2:]]
    found = ratio_of_extras(plus(0.5), lora, LINEAR)
    assert (found.value, found.low, found.high) == (pytest.approx(0.5), pytest.approx(0.5), None)


def test_faster_than_the_linear_layer_is_a_negative_ratio() -> None:
    assert ratio_of_extras(plus(-0.1), plus(0.2), LINEAR).value == pytest.approx(-0.5)
