"""Ratios against numbers worked out by hand; verdicts follow from those of the cases that a goal speaks of."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mixlora_cli.analysis.bench.counters import Measurement
from mixlora_cli.analysis.bench.goals import EXTRA, GOALS, Comparison, Goal, compare, judge
from mixlora_cli.stats import Estimate, ratio_of_medians

FP32, BF16, PUBLISHED, FLAT, ONE, PEAK, STEP, *PEERS, GENERATION, BATCHING, ANSWERS, SCORING = GOALS


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


def without_published() -> Measurement:
    times = {name: seconds for name, seconds in layer().seconds.items() if name != "published"}
    return replace(layer(), seconds=times)


def other_pools() -> Measurement:
    times = {**layer().seconds, "mixlora_e32": [9.0] * 3}
    return replace(layer(), case={**layer().case, "pools": "16,32"}, seconds=times)


ABOUT: dict[str, Any] = {"model": "tiny", "factors": 16}
MEMORY = Measurement(
    "memory",
    ABOUT,
    counts={
        name: {"peak_bytes": peak, "step_bytes": 10, "saved_bytes": 5}
        for name, peak in (("lora", 1000), ("mixlora", 1021))
    },
)
STEPS = Measurement("step", ABOUT, {"lora": [1.0], "mixlora": [1.04]})
GENERATED = Measurement("generation", ABOUT, {"base": [0.5], "lora": [1.0], "mixlora": [1.06]})
EVALUATED = Measurement(
    "evaluation",
    ABOUT,
    {"batched": [1.0], "one_by_one": [2.5], "one_by_one_published": [5.5], "plain_loop": [1.4]},
)
TIMES = {"peft_loop": [1.75], "trl": [2.0], "lora": [1.2], "mixlora": [1.12], "mixlora_trained": [1.2]}
PEER_STEPS = Measurement(
    "peers",
    ABOUT,
    TIMES,
    {name: {"peak_bytes": 840 if name == "mixlora" else 1000} for name in TIMES},
)
NO_TRL = replace(PEER_STEPS, seconds={name: TIMES[name] for name in TIMES if name != "trl"})
SCORED = Measurement("scoring", {"predictions": 100_000}, {"scoring": [4.0, 4.5, 7.0]})
ALMOST = {"mixlora_e16": 1.19}


@pytest.mark.parametrize(
    ("goal", "done", "expected"),
    [
        (FP32, [layer()], ("met", 1, 1, 0.5)),
        (FP32, [layer(), layer("1024", mixlora_e16=1.17)], ("not met", 1, 2, 0.85)),  # every case has to
        (FP32, [layer(**ALMOST), layer(dtype="bf16")], ("not met", 0, 1, 0.95)),  # bounds of their own
        (BF16, [layer(dtype="bf16", **ALMOST)], ("met", 1, 1, 0.95)),
        (BF16, [layer(**ALMOST)], ("not measured", 0, 0, None)),
        (FP32, [layer("576", mixlora_e16=9.0)], ("not measured", 0, 0, None)),  # narrow
        (FP32, [layer(mixlora_e64=9.0)], ("met", 1, 1, 0.5)),  # another pool
        (FP32, [layer(lora=0.9)], ("not met", 0, 1, None)),  # cannot be told
        (
            PUBLISHED,
            [layer(), *(layer(each, published=1.0) for each in ("1024", "4096x11008"))],
            ("met", 1, 1, 4.0),
        ),
        (PUBLISHED, [layer(published=3.2)], ("not met", 0, 1, 3.2 / 1.1)),
        (PUBLISHED, [without_published()], ("not measured", 0, 0, None)),
        (FLAT, [layer()], ("met", 1, 1, 1.12 / 1.1)),
        (FLAT, [layer(mixlora_e64=1.2)], ("not met", 0, 1, 1.2 / 1.1)),
        (FLAT, [other_pools()], ("not measured", 0, 0, None)),
        (ONE, [layer(), layer("1024", mixlora_e16=1.18)], ("not met", 1, 2, 1.18 / 1.2)),
        (ONE, [layer(), layer("4096x11008", **ALMOST), layer("576", **ALMOST)], ("met", 1, 1, 1.1 / 1.2)),
        (ONE, [replace(layer(), case={**layer().case, "batch": 8})], ("not measured", 0, 0, None)),
        (PEAK, [MEMORY], ("not met", 0, 1, 1.021)),
        (STEP, [STEPS, GENERATED], ("met", 1, 1, 1.04)),
        (GENERATION, [STEPS, GENERATED], ("not met", 0, 1, 1.06)),
        (BATCHING, [EVALUATED], ("met", 1, 1, 5.5)),
        (ANSWERS, [EVALUATED], ("not met", 0, 1, 1.4)),
        (PEERS[0], [PEER_STEPS, STEPS], ("met", 1, 1, 1.12 / 1.2)),
        (PEERS[1], [PEER_STEPS], ("met", 1, 1, 0.64)),
        (PEERS[2], [PEER_STEPS], ("not met", 0, 1, 0.56)),
        (PEERS[2], [NO_TRL], ("not measured", 0, 0, None)),
        (PEERS[3], [NO_TRL], ("not met", 0, 1, 1.2 / 1.12)),
        (PEERS[4], [NO_TRL], ("met", 1, 1, 0.84)),
        (SCORING, [SCORED], ("met", 1, 1, 4.5)),
        (SCORING, [replace(SCORED, case={"predictions": 160})], ("not measured", 0, 0, None)),
    ],
)
def test_verdicts(goal: Goal, done: list[Measurement], expected: tuple[Any, ...]) -> None:
    found = judge(goal, [one for measurement in done for one in compare(measurement)])
    worst = None if found.worst is None else found.worst.estimate.value
    value = None if expected[-1] is None else pytest.approx(expected[-1])
    assert (found.verdict, found.num_met, found.num_cases, worst) == (*expected[:-1], value)


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
