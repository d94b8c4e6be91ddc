"""Ratios of the variants of each case, the goals that they are held against, and the verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mixlora_cli.analysis.bench.counters import Measurement
from mixlora_cli.analysis.bench.layers import LINEAR, LORA, PUBLISHED, mixlora
from mixlora_cli.analysis.bench.peers import PEFT_LOOP, TRAINED, TRL
from mixlora_cli.analysis.bench.whole import (
    BASE,
    BATCHED,
    ONE_BY_ONE,
    ONE_BY_ONE_PUBLISHED,
    PLAIN_LOOP,
    SCORING,
)
from mixlora_cli.config import Part, Precision
from mixlora_cli.stats import Estimate, ratio_of_medians

MIXLORA = "mixlora"

EXTRA = "extra time, MixLoRA / LoRA"
TIME = "time, MixLoRA / LoRA"
FASTER = "time, published form / MixLoRA"
FLAT = "time, largest pool / smallest"
FLOPS = "operations, MixLoRA / LoRA"
SAVED = "bytes kept for backward, MixLoRA / LoRA"
PEAK = "peak memory, MixLoRA / LoRA"
SCORING_SECONDS = "seconds to score what is stored"
EVALUATION = "time, one by one in the published form / batched"
ANSWERS = "answers a second, batched / plain loop"

Verdict = Literal["met", "not met", "not measured"]


def over(what: str, name: str, other: str) -> str:
    """What a ratio of two steps is called, of their "time" or their "peak memory"."""
    return f"{what}, {name} / {other}"


@dataclass(frozen=True)
class Comparison:
    """One ratio of one case; of the scoring, the seconds themselves."""

    name: str
    """One of the constants above."""
    measurement: Measurement
    factors: int
    """E of the MixLoRA in it, 0 where there is none."""
    estimate: Estimate


def compare(done: Measurement) -> list[Comparison]:
    """All ratios of a finished case."""
    factors = int(done.case.get("factors", 0))
    return [
        Comparison(name, done, factors if pool is None else pool, estimate)
        for name, pool, estimate in _ratios(done)
    ]


_Ratio = tuple[str, int | None, Estimate]
"""Name, E where it is not the case's own, and the ratio."""
_OF_WHOLE_TIMES = {
    "step": [(TIME, MIXLORA, LORA)],
    "generation": [
        (TIME, MIXLORA, LORA),
        ("time, MixLoRA / base", MIXLORA, BASE),
        ("time, LoRA / base", LORA, BASE),
    ],
    "evaluation": [
        ("time, one by one / batched", ONE_BY_ONE, BATCHED),
        (EVALUATION, ONE_BY_ONE_PUBLISHED, BATCHED),
        (ANSWERS, PLAIN_LOOP, BATCHED),
    ],
}
_OF_MEMORY = {
    PEAK: "peak_bytes",
    "memory above the resting state, MixLoRA / LoRA": "step_bytes",
    SAVED: "saved_bytes",
}


def _ratios(done: Measurement) -> Iterator[_Ratio]:
    times, counts = done.seconds, done.counts
    if done.part == "layer":
        yield from _ratios_of_layer(done)
    elif done.part == "operations":
        for pool in done.pools:
            ours, lora = counts[mixlora(pool)], counts[LORA]
            flops, lora_flops = (each["forward_flops"] + each["backward_flops"] for each in (ours, lora))
            yield FLOPS, pool, _exact(flops / lora_flops)
            yield SAVED, pool, _exact(ours["saved_bytes"] / lora["saved_bytes"])
    elif done.part == "memory":
        for name, count in _OF_MEMORY.items():
            yield name, None, _exact(counts[MIXLORA][count] / counts[LORA][count])
    elif done.part == "peers":
        pairs = [(name, PEFT_LOOP) for name in times] + [(MIXLORA, LORA), (MIXLORA, TRL), (TRAINED, MIXLORA)]
        for name, other in pairs:
            if other in times:  # it may not be installed
                peaks = _exact(counts[name]["peak_bytes"] / counts[other]["peak_bytes"])
                yield over("time", name, other), None, ratio_of_medians(times[name], times[other])
                yield over("peak memory", name, other), None, peaks
    elif done.part == "scoring":
        yield SCORING_SECONDS, 0, ratio_of_medians(times[SCORING], [1.0] * len(times[SCORING]))
    else:
        for name, above, below in _OF_WHOLE_TIMES[done.part]:
            yield name, None, ratio_of_medians(times[above], times[below])


def _ratios_of_layer(done: Measurement) -> Iterator[_Ratio]:
    times, pools = done.seconds, done.pools
    above = {name: above_linear(seconds, times[LINEAR]) for name, seconds in times.items()}
    for pool in pools:
        yield EXTRA, pool, ratio_of_medians(above[mixlora(pool)], above[LORA])
        yield TIME, pool, ratio_of_medians(times[mixlora(pool)], times[LORA])
    if PUBLISHED in times:
        ours = times[mixlora(done.number("factors"))]
        yield FASTER, None, ratio_of_medians(times[PUBLISHED], ours)
    if len(pools) > 1:
        few, many = mixlora(pools[0]), mixlora(pools[-1])
        yield FLAT, pools[-1], ratio_of_medians(times[many], times[few])
        yield "extra time, largest pool / smallest", pools[-1], ratio_of_medians(above[many], above[few])


def above_linear(seconds: Sequence[float], linear: Sequence[float]) -> list[float]:
    """Seconds above the frozen linear layer alone; within a round the machine was in the same mood for both."""
    return [one - other for one, other in zip(seconds, linear, strict=True)]


def _exact(value: float) -> Estimate:
    """A ratio of counts, which do not vary."""
    return Estimate(value, value, value)


def extras(done: Measurement) -> dict[str, Estimate]:
    """Seconds above the frozen linear layer alone, by variant; empty where there is no such layer."""
    if LINEAR not in done.seconds:
        return {}
    linear, ones = done.seconds[LINEAR], [1.0] * len(done.seconds[LINEAR])
    return {
        name: ratio_of_medians(above_linear(times, linear), ones)
        for name, times in done.seconds.items()
        if name != LINEAR
    }


def as_asked(one: Comparison) -> bool:
    """MixLoRA with E = `factors`."""
    return one.factors == one.measurement.number("factors")


def _wide(one: Comparison) -> bool:
    return as_asked(one) and one.measurement.number("d_in") >= 1024


def _at_4096(one: Comparison) -> bool:
    return as_asked(one) and one.measurement.number("d_in") == one.measurement.number("d_out") == 4096


def _of_one_instance(one: Comparison) -> bool:
    done = one.measurement
    square = done.number("d_in") == done.number("d_out") in (1024, 4096)
    return as_asked(one) and square and done.number("batch") == 1


def _from_16_to_64(one: Comparison) -> bool:
    return (one.measurement.pools[0], one.measurement.pools[-1]) == (16, 64)


@dataclass(frozen=True)
class Goal:
    """A bound on one ratio, for all cases that it speaks of."""

    text: str
    part: Part
    comparison: str
    limit: float
    at_most: bool = True
    """Else at least."""
    applies: Callable[[Comparison], bool] = as_asked
    dtype: Precision | None = None
    """Number format of the layers that it speaks of; None = any."""

    def holds(self, value: float) -> bool:
        """Whether a ratio is on the right side."""
        return value <= self.limit if self.at_most else value >= self.limit

    def speaks_of(self, one: Comparison) -> bool:
        """Whether this ratio is one that the goal bounds."""
        done = one.measurement
        alike = (one.name, done.part) == (self.comparison, self.part)
        return alike and self.dtype in (None, done.case.get("dtype")) and self.applies(one)


GOALS = (
    Goal(
        "extra time over the frozen layer <= 0.8x of LoRA's, fp32, widths >= 1024",
        "layer",
        EXTRA,
        0.8,
        applies=_wide,
        dtype="fp32",
    ),
    Goal(
        "extra time over the frozen layer <= 1.0x of LoRA's, bf16, widths >= 1024",
        "layer",
        EXTRA,
        1.0,
        applies=_wide,
        dtype="bf16",
    ),
    Goal("layer >= 3x faster than the published form, width 4096", "layer", FASTER, 3.0, False, _at_4096),
    Goal("layer with E=64 within 1.03x of E=16", "layer", FLAT, 1.03, applies=_from_16_to_64),
    Goal(
        "whole layer, one instance, 1024 and 4096 wide: <= 0.95x of LoRA's",
        "layer",
        TIME,
        0.95,
        applies=_of_one_instance,
    ),
    Goal("peak memory of a training step <= 1.02x of LoRA's", "memory", PEAK, 1.02),
    Goal("whole training step <= 1.05x of LoRA's", "step", TIME, 1.05),
    *(
        Goal(f"{what} of a step: {name} <= {limit}x {other}", "peers", over(what, name, other), limit)
        for what, name, other, limit in (
            ("time", MIXLORA, LORA, 0.97),
            ("time", MIXLORA, PEFT_LOOP, 0.7),
            ("time", MIXLORA, TRL, 0.55),
            ("time", TRAINED, MIXLORA, 1.05),
            ("peak memory", MIXLORA, PEFT_LOOP, 0.85),
        )
    ),
    Goal("whole generation <= 1.00x of LoRA's", "generation", TIME, 1.0),
    Goal(
        "evaluation in batches >= 5x faster than one by one in the published form",
        "evaluation",
        EVALUATION,
        5.0,
        at_most=False,
    ),
    Goal(
        "evaluation gives >= 1.5x the answers a second of a plain loop",
        "evaluation",
        ANSWERS,
        1.5,
        at_most=False,
    ),
    Goal(
        "100,000 stored predictions scored in <= 5 s",
        "scoring",
        SCORING_SECONDS,
        5.0,
        applies=lambda one: one.measurement.number("predictions") == 100_000,
    ),
)


@dataclass(frozen=True)
class Judgement:
    """What became of a goal."""

    goal: Goal
    verdict: Verdict
    num_met: int = 0
    num_cases: int = 0
    worst: Comparison | None = None
    """The case farthest on the wrong side; None if nothing was measured."""

    @property
    def certain(self) -> bool:
        """The interval of the worst case lies whole on the side that the verdict says."""
        if self.worst is None:
            return False
        ends = (self.worst.estimate.low, self.worst.estimate.high)
        return None not in ends and len({self.goal.holds(end) for end in ends if end is not None}) == 1


def judge(goal: Goal, found: Sequence[Comparison]) -> Judgement:
    """Met if every case meets it; a ratio that could not be told does not."""
    cases = [comparison for comparison in found if goal.speaks_of(comparison)]
    if not cases:
        return Judgement(goal, "not measured")

    def badness(case: Comparison) -> float:
        value = case.estimate.value
        return float("inf") if value is None else value if goal.at_most else -value

    met = [case for case in cases if case.estimate.value is not None and goal.holds(case.estimate.value)]
    verdict: Verdict = "met" if len(met) == len(cases) else "not met"
    return Judgement(goal, verdict, len(met), len(cases), max(cases, key=badness))


@dataclass(frozen=True)
class Findings:
    """The measured cases and what follows from them."""

    machine: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    judgements: tuple[Judgement, ...]

    def estimates(self, done: Measurement) -> dict[tuple[str, int], Estimate]:
        """The ratios of a case, by name and E."""
        own = (one for one in self.comparisons if one.measurement is done)
        return {(one.name, one.factors): one.estimate for one in own}


def find(machine: Mapping[str, Any], measurements: Sequence[Measurement]) -> Findings:
    """Compare the variants of each case, and judge the goals."""
    found = [comparison for measurement in measurements for comparison in compare(measurement)]
    return Findings(machine, tuple(measurements), tuple(found), tuple(judge(goal, found) for goal in GOALS))
