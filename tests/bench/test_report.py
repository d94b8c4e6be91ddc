"""Ratios against numbers worked out by hand; verdicts follow from those of the cases that a goal speaks of."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mixlora_cli.analysis.bench.counters import Measurement
from mixlora_cli.analysis.bench.report import EXTRA, GOALS, Comparison, Goal, compare, judge
from mixlora_cli.stats import Estimate, ratio_of_medians

FP32, BF16, PUBLISHED, FLAT, PEAK, STEP, GENERATION, BATCHING, SCORING = GOALS


def layer(shape: str = "4096", dtype: str = "fp32", **times: float) -> Measurement:
    d_in, _, d_out = shape.partition("x")
    case: dict[str, Any] = {
        "shape": shape,
        "d_in": int(d_in),
        "d_out": int(d_out or d_in),
        "dtype": dtype,
        "batch": 1,
        "factors": 16,
        "pools": "16,64",
    }
    seconds = {"linear": 1.0, "lora": 1.2, "mixlora_e16": 1.1, "mixlora_e64": 1.12, "published": 4.4, **times}
    return Measurement("layer", case, {name: [time] * 3 for name, time in seconds.items()})


def verdict(goal: Goal, *done: Measurement) -> tuple[str, int, int, float | None]:
    judgement = judge(goal, [found for measurement in done for found in compare(measurement)])
    worst = None if judgement.worst is None else judgement.worst.estimate.value
    return judgement.verdict, judgement.num_met, judgement.num_cases, worst


def test_every_case_has_to_meet_the_goal() -> None:
    good, bad = layer(), layer("1024", mixlora_e16=1.17)
    assert verdict(FP32, good) == ("met", 1, 1, pytest.approx(0.5))
    assert verdict(FP32, good, bad) == ("not met", 1, 2, pytest.approx(0.85))


def test_each_number_format_has_its_own_bound() -> None:
    ours = {"mixlora_e16": 1.19}
    assert verdict(FP32, layer(**ours), layer(dtype="bf16"))[0] == "not met"
    assert verdict(BF16, layer(dtype="bf16", **ours)) == ("met", 1, 1, pytest.approx(0.95))
    assert verdict(BF16, layer(**ours)) == ("not measured", 0, 0, None)


def test_narrow_layers_and_other_pools_are_not_judged() -> None:
    assert verdict(FP32, layer("576", mixlora_e16=9.0))[0] == "not measured"
    assert verdict(FP32, layer(mixlora_e64=9.0)) == ("met", 1, 1, pytest.approx(0.5))


def test_the_published_form_is_judged_at_4096_alone() -> None:
    assert verdict(PUBLISHED, layer(), layer("1024", published=1.0), layer("4096x11008", published=1.0)) == (
        "met",
        1,
        1,
        pytest.approx(4.0),
    )
    assert verdict(PUBLISHED, layer(published=3.2))[0] == "not met"
    without = layer()
    del without.seconds["published"]  # type: ignore[attr-defined]
    assert verdict(PUBLISHED, without)[0] == "not measured"


def test_flat_in_the_pool() -> None:
    assert verdict(FLAT, layer()) == ("met", 1, 1, pytest.approx(1.12 / 1.1))
    assert verdict(FLAT, layer(mixlora_e64=1.2))[0] == "not met"
    other = replace(layer(), case={**layer().case, "pools": "16,32"})
    seconds = {**other.seconds, "mixlora_e32": [9.0] * 3}
    assert verdict(FLAT, replace(other, seconds=seconds))[0] == "not measured"


def test_whole_model_goals() -> None:
    about: dict[str, Any] = {"model": "tiny", "factors": 16}
    counts = {
        name: {"peak_bytes": peak, "step_bytes": 10, "saved_bytes": 5}
        for name, peak in (("lora", 1000), ("mixlora", 1021))
    }
    step = Measurement("step", about, {"lora": [1.0], "mixlora": [1.04]})
    generation = Measurement("generation", about, {"base": [0.5], "lora": [1.0], "mixlora": [1.06]})
    evaluation = Measurement(
        "evaluation", about, {"batched": [1.0], "one_by_one": [2.5], "one_by_one_published": [5.5]}
    )
    assert verdict(PEAK, Measurement("memory", about, counts=counts)) == ("not met", 0, 1, 1.021)
    assert verdict(STEP, step, generation) == ("met", 1, 1, 1.04)
    assert verdict(GENERATION, step, generation) == ("not met", 0, 1, 1.06)
    scoring = Measurement("scoring", {"predictions": 100_000}, {"scoring": [4.0, 4.5, 7.0]})
    assert verdict(SCORING, scoring) == ("met", 1, 1, 4.5)
    assert verdict(SCORING, replace(scoring, case={"predictions": 160}))[0] == "not measured"
    assert verdict(BATCHING, evaluation) == ("met", 1, 1, 5.5)


def test_what_cannot_be_told_is_not_met() -> None:
    assert verdict(FP32, layer(lora=0.9)) == ("not met", 0, 1, None)


@pytest.mark.parametrize(
    ("estimate", "certain"),
    [
        (Estimate(0.7, 0.6, 0.79), True),
        (Estimate(0.7, 0.6, 0.81), False),
        (Estimate(0.9, 0.85, 1.0), True),
        (Estimate(0.7, 0.6, None), False),
        (Estimate(0.5, 0.5, 0.5), True),
    ],
)
def test_certain_is_an_interval_on_one_side(estimate: Estimate, certain: bool) -> None:
    found = Comparison(EXTRA, layer(), 16, estimate)
    assert judge(FP32, [found]).certain is certain


LINEAR = [1.0, 2.0, 1.5, 4.0, 1.2]


def ratio_of_extras(ours: list[float], lora: list[float]) -> Estimate:
    """Of the times above a linear layer with `LINEAR`."""
    times = {"linear": LINEAR, "lora": lora, "mixlora_e16": ours, "mixlora_e64": ours}
    done = Measurement("layer", layer().case, times)
    return next(found.estimate for found in compare(done) if (found.name, found.factors) == (EXTRA, 16))


def plus(seconds: float) -> list[float]:
    """Always so much slower than the linear layer in the same round."""
    return [time + seconds for time in LINEAR]


@pytest.mark.parametrize(
    ("ours", "lora", "expected"),
    [
        (plus(0.25), plus(0.5), (0.5, 0.5, 0.5)),  # what slows a whole round cancels
        (plus(-0.1), plus(0.2), (-0.5, -0.5, -0.5)),
        (plus(0.1), plus(-0.1), (None, None, None)),  # LoRA is no slower than the linear layer
        (plus(0.5), [LINEAR[0] - 1, LINEAR[1] - 1, *plus(1.0)[2:]], (0.5, 0.5, None)),  # or may not be
    ],
)
def test_extra_time_is_that_above_the_linear_layer(
    ours: list[float], lora: list[float], expected: tuple[float | None, ...]
) -> None:
    found = ratio_of_extras(ours, lora)
    assert (found.value, found.low, found.high) == tuple(
        None if end is None else pytest.approx(end) for end in expected
    )


def test_ratio_is_that_of_the_medians() -> None:
    assert ratio_of_medians([1.0, 9.0, 2.0], [4.0, 1.0, 8.0]).value == 0.5


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        above, below = rng.normal(6.0, 0.5, 20), rng.normal(5.0, 0.5, 20)
        found = ratio_of_medians(list(above), list(below))
        assert found.low is not None and found.high is not None
        hits += found.low <= 1.2 <= found.high
    assert 53 <= hits <= 60
