from __future__ import annotations

import pytest

from mixlora_cli.reproduce.estimate import in_words, time_left, total


def test_sum_of_what_is_known() -> None:
    assert total([10.0, None, 5.0]) == (15.0, 1)


def test_estimates_are_corrected_by_what_parts_took() -> None:
    assert time_left([], [100.0, 50.0]) == 150.0
    assert time_left([(100.0, 200.0), (50.0, 100.0)], [10.0]) == pytest.approx(20.0)


def test_parts_without_an_estimate_take_as_long_as_the_others_did() -> None:
    assert time_left([], [10.0, None]) is None
    assert time_left([(None, 30.0), (None, 50.0)], [None, None]) == 80.0
    assert time_left([(10.0, 20.0), (None, 40.0)], [10.0, None]) == pytest.approx(20.0 + 30.0)


def test_in_words() -> None:
    assert (in_words(3723.4), in_words(None)) == ("1:02:03", "?")
