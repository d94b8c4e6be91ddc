"""The goals that MixLoRA's cost is held against, and the verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mixlora_cli.analysis.bench import comparisons
from mixlora_cli.analysis.bench.comparisons import Comparison, pools
from mixlora_cli.analysis.bench.estimates import Estimate
from mixlora_cli.analysis.bench.measurement import Measurement
from mixlora_cli.config import Part, Precision

Verdict = Literal["met", "not met", "not measured"]


@dataclass(frozen=True)
class Goal:
    """A bound on one ratio, for all cases that it speaks of."""

    text: str
    part: Part
    comparison: str
    limit: float
    at_most: bool = True
    """Else at least."""
    dtype: Precision | None = None
    """Number format of the layers that it speaks of; None = all."""
    applies: Callable[[Measurement], bool] = lambda measurement: True
    compared_factors: Literal["asked", "any"] = "asked"
    """Only MixLoRA with E = `factors`, or whatever the comparison has."""

    def holds(self, value: float) -> bool:
        """Whether a ratio is on the right side."""
        return value <= self.limit if self.at_most else value >= self.limit

    def speaks_of(self, comparison: Comparison) -> bool:
        """Whether this ratio is one that the goal bounds."""
        done = comparison.measurement
        if comparison.name != self.comparison or done.part != self.part:
            return False
        asked = self.compared_factors == "any" or comparison.factors == int(done.case["factors"])
        return asked and self.dtype in (None, done.case.get("dtype")) and self.applies(done)


@dataclass(frozen=True)
class Judgement:
    """What became of a goal."""

    goal: Goal
    verdict: Verdict
    num_met: int
    num_cases: int
    worst: Comparison | None
    """The case farthest on the wrong side; None if nothing was measured."""

    @property
    def certain(self) -> bool:
        """The interval of the worst case lies whole on the side that the verdict says."""
        if self.worst is None:
            return False
        estimate = self.worst.estimate
        ends = (estimate.low, estimate.high)
        return None not in ends and len({self.goal.holds(end) for end in ends if end is not None}) == 1


def judge(goal: Goal, found: Sequence[Comparison]) -> Judgement:
    """Met if every case meets it; a ratio that could not be told does not."""
    cases = [comparison for comparison in found if goal.speaks_of(comparison)]
    if not cases:
        return Judgement(goal, "not measured", 0, 0, None)
    met = [case for case in cases if case.estimate.value is not None and goal.holds(case.estimate.value)]
    worst = max(cases, key=lambda case: _badness(goal, case.estimate))
    return Judgement(goal, "met" if len(met) == len(cases) else "not met", len(met), len(cases), worst)


def _badness(goal: Goal, estimate: Estimate) -> float:
    if estimate.value is None:
        return float("inf")
    return estimate.value if goal.at_most else -estimate.value


def _wide(done: Measurement) -> bool:
    return int(done.case["d_in"]) >= 1024


def _at_4096(done: Measurement) -> bool:
    return int(done.case["d_in"]) == 4096 and int(done.case["d_out"]) == 4096


def _from_16_to_64(done: Measurement) -> bool:
    return (pools(done)[0], pools(done)[-1]) == (16, 64)


GOALS = (
    Goal(
        "extra time over the frozen layer <= 0.8x of LoRA's, fp32, widths >= 1024",
        "layer",
        comparisons.EXTRA,
        0.8,
        dtype="fp32",
        applies=_wide,
    ),
    Goal(
        "extra time over the frozen layer <= 1.0x of LoRA's, bf16, widths >= 1024",
        "layer",
        comparisons.EXTRA,
        1.0,
        dtype="bf16",
        applies=_wide,
    ),
    Goal(
        "layer >= 3x faster than the published form, width 4096",
        "layer",
        comparisons.FASTER,
        3.0,
        at_most=False,
        applies=_at_4096,
    ),
    Goal(
        "layer with E=64 within 1.05x of E=16",
        "layer",
        comparisons.FLAT,
        1.05,
        applies=_from_16_to_64,
        compared_factors="any",
    ),
    Goal("peak memory of a training step <= 1.02x of LoRA's", "memory", comparisons.PEAK, 1.02),
    Goal("whole training step <= 1.05x of LoRA's", "step", comparisons.TIME, 1.05),
    Goal("whole generation <= 1.05x of LoRA's", "generation", comparisons.TIME, 1.05),
    Goal(
        "evaluation in batches >= 5x faster than one by one in the published form",
        "evaluation",
        comparisons.EVALUATION,
        5.0,
        at_most=False,
    ),
    Goal(
        "100,000 stored predictions scored in <= 5 s",
        "scoring",
        comparisons.SCORING_SECONDS,
        5.0,
        applies=lambda done: int(done.case["predictions"]) == 100_000,
        compared_factors="any",
    ),
)
