"""`results.json`: everything that a benchmark found.

    {"format", "machine": {processor, cores, torch_threads, bf16_in_hardware, versions, ...},
     "cases": [{"part", "case": {...},
                "seconds": {variant: {"median", "lower_quartile", "upper_quartile", "rounds"}},
                "extra_seconds": {variant: {"value", "low", "high"}},       layers: above the frozen linear alone
                "counts": {variant: {name: integer}},
                "ratios": [{"name", "factors", "value", "low", "high"}]}],
     "goals": [{"goal", "verdict", "certain", "value", "low", "high", "case", "num_met", "num_cases"}]}

Seconds of every single round are in `measurements.jsonl`. `low` and `high` are the ends of a 95 % interval; null is a
number that the rounds do not tell (LoRA was not slower than the frozen layer alone).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixlora_cli.analysis.bench.comparisons import Comparison, compare
from mixlora_cli.analysis.bench.estimates import Estimate, extra, spread
from mixlora_cli.analysis.bench.goals import GOALS, Judgement, judge
from mixlora_cli.analysis.bench.layers import LINEAR
from mixlora_cli.analysis.bench.measurement import Measurement
from mixlora_cli.store import write_text

FORMAT = "mixlora-bench/1"
FILE_NAME = "results.json"


@dataclass(frozen=True)
class Findings:
    """The measured cases and what follows from them."""

    machine: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    judgements: tuple[Judgement, ...]


def find(machine: Mapping[str, Any], measurements: Sequence[Measurement]) -> Findings:
    """Compare the variants of each case, and judge the goals."""
    found = [comparison for measurement in measurements for comparison in compare(measurement)]
    judgements = tuple(judge(goal, found) for goal in GOALS)
    return Findings(machine, tuple(measurements), tuple(found), judgements)


def extras(measurement: Measurement) -> dict[str, Estimate]:
    """Seconds above the frozen linear layer alone, by variant; empty where there is no such layer."""
    if LINEAR not in measurement.seconds:
        return {}
    linear = measurement.seconds[LINEAR]
    return {name: extra(times, linear) for name, times in measurement.seconds.items() if name != LINEAR}


def write_results(findings: Findings, path: Path) -> None:
    """Write `results.json` whole or not at all."""
    content = {
        "format": FORMAT,
        "machine": dict(findings.machine),
        "cases": [_case(measurement, findings.comparisons) for measurement in findings.measurements],
        "goals": [_goal(judgement) for judgement in findings.judgements],
    }
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _case(measurement: Measurement, found: Sequence[Comparison]) -> dict[str, Any]:
    own = [comparison for comparison in found if comparison.measurement is measurement]
    return {
        "part": measurement.part,
        "case": dict(measurement.case),
        "seconds": {name: asdict(spread(times)) for name, times in measurement.seconds.items()},
        "extra_seconds": {name: asdict(estimate) for name, estimate in extras(measurement).items()},
        "counts": {name: dict(counts) for name, counts in measurement.counts.items()},
        "ratios": [{"name": one.name, "factors": one.factors, **asdict(one.estimate)} for one in own],
    }


def _goal(judgement: Judgement) -> dict[str, Any]:
    worst = judgement.worst
    estimate = Estimate(None, None, None) if worst is None else worst.estimate
    return {
        "goal": judgement.goal.text,
        "verdict": judgement.verdict,
        "certain": judgement.certain,
        **asdict(estimate),
        "case": None if worst is None else dict(worst.measurement.case),
        "num_met": judgement.num_met,
        "num_cases": judgement.num_cases,
    }
