"""Which variants are compared in each part, and the ratios that come out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mixlora_cli.analysis.bench.estimates import Estimate, exact, median, ratio, ratio_of_extras
from mixlora_cli.analysis.bench.layers import LINEAR, LORA, PUBLISHED, mixlora
from mixlora_cli.analysis.bench.measure import BATCHED, ONE_BY_ONE, ONE_BY_ONE_PUBLISHED, SCORING
from mixlora_cli.analysis.bench.measurement import Measurement

MIXLORA = "mixlora"

EXTRA = "extra time, MixLoRA / LoRA"
TIME = "time, MixLoRA / LoRA"
FASTER = "time, published form / MixLoRA"
FLAT = "time, largest pool / smallest"
FLAT_EXTRA = "extra time, largest pool / smallest"
FLOPS = "operations, MixLoRA / LoRA"
SAVED = "bytes kept for backward, MixLoRA / LoRA"
PEAK = "peak memory, MixLoRA / LoRA"
STEP_MEMORY = "memory above the resting state, MixLoRA / LoRA"
OVER_BASE = "time, MixLoRA / base"
LORA_OVER_BASE = "time, LoRA / base"
BATCHING = "time, one by one / batched"
SCORING_SECONDS = "seconds to score what is stored"
EVALUATION = "time, one by one in the published form / batched"


@dataclass(frozen=True)
class Comparison:
    """One ratio of one case; of the scoring, the seconds themselves."""

    name: str
    """One of the constants above."""
    measurement: Measurement
    factors: int
    """E of the MixLoRA in it, 0 where there is none."""
    estimate: Estimate


def compare(measurement: Measurement) -> list[Comparison]:
    """All ratios of a finished case."""
    return list(_COMPARE[measurement.part](measurement))


def pools(measurement: Measurement) -> list[int]:
    """E of the variants in a layer's case, ascending."""
    return [int(pool) for pool in str(measurement.case["pools"]).split(",")]


def _layer(done: Measurement) -> Iterator[Comparison]:
    times, factors, sizes = done.seconds, int(done.case["factors"]), pools(done)
    for pool in sizes:
        ours, lora, linear = times[mixlora(pool)], times[LORA], times[LINEAR]
        yield Comparison(EXTRA, done, pool, ratio_of_extras(ours, lora, linear))
        yield Comparison(TIME, done, pool, ratio(ours, lora))
    if PUBLISHED in times:
        yield Comparison(FASTER, done, factors, ratio(times[PUBLISHED], times[mixlora(factors)]))
    if len(sizes) > 1:
        few, many = times[mixlora(sizes[0])], times[mixlora(sizes[-1])]
        yield Comparison(FLAT, done, sizes[-1], ratio(many, few))
        yield Comparison(FLAT_EXTRA, done, sizes[-1], ratio_of_extras(many, few, times[LINEAR]))


def _operations(done: Measurement) -> Iterator[Comparison]:
    lora = done.counts[LORA]
    for pool in pools(done):
        ours = done.counts[mixlora(pool)]
        flops = [counts["forward_flops"] + counts["backward_flops"] for counts in (ours, lora)]
        yield Comparison(FLOPS, done, pool, exact(flops[0] / flops[1]))
        yield Comparison(SAVED, done, pool, exact(ours["saved_bytes"] / lora["saved_bytes"]))


def _memory(done: Measurement) -> Iterator[Comparison]:
    ours, lora = done.counts[MIXLORA], done.counts[LORA]
    for name, count in ((PEAK, "peak_bytes"), (STEP_MEMORY, "step_bytes"), (SAVED, "saved_bytes")):
        yield Comparison(name, done, int(done.case["factors"]), exact(ours[count] / lora[count]))


def _step(done: Measurement) -> Iterator[Comparison]:
    yield Comparison(TIME, done, int(done.case["factors"]), ratio(done.seconds[MIXLORA], done.seconds[LORA]))


def _generation(done: Measurement) -> Iterator[Comparison]:
    times, factors = done.seconds, int(done.case["factors"])
    yield Comparison(TIME, done, factors, ratio(times[MIXLORA], times[LORA]))
    yield Comparison(OVER_BASE, done, factors, ratio(times[MIXLORA], times["base"]))
    yield Comparison(LORA_OVER_BASE, done, factors, ratio(times[LORA], times["base"]))


def _evaluation(done: Measurement) -> Iterator[Comparison]:
    times, factors = done.seconds, int(done.case["factors"])
    yield Comparison(BATCHING, done, factors, ratio(times[ONE_BY_ONE], times[BATCHED]))
    yield Comparison(EVALUATION, done, factors, ratio(times[ONE_BY_ONE_PUBLISHED], times[BATCHED]))


def _scoring(done: Measurement) -> Iterator[Comparison]:
    yield Comparison(SCORING_SECONDS, done, 0, median(done.seconds[SCORING]))


_COMPARE = {
    "layer": _layer,
    "operations": _operations,
    "memory": _memory,
    "step": _step,
    "generation": _generation,
    "evaluation": _evaluation,
    "scoring": _scoring,
}
