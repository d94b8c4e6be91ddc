"""Time variants of one computation against each other, fairly on a machine whose speed drifts.

All variants run once in each round, in an order that is drawn anew: what slows the machine down for a while slows all
of them, and none always runs after the same other one.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MAX_ROUNDS = 500
"""However quick a case is."""


@dataclass(frozen=True)
class Variant:
    """One way to compute."""

    run: Callable[[], object]
    """What is timed."""
    before: Callable[[], None] = lambda: None
    """Done before each run, outside the time."""


@dataclass(frozen=True)
class Rounds:
    """How often a case runs."""

    count: int
    warmup: int = 0
    min_seconds: float = 0.0
    """More rounds than `count` are run until the counted ones took so long (at most `MAX_ROUNDS`)."""
    seed: int = 0
    """Of the order within the rounds."""


def interleave(
    variants: Mapping[str, Variant],
    rounds: Rounds,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every variant in every counted round: `times[name][i]` is that of round i."""
    order = random.Random(rounds.seed)
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # its pauses would fall on one variant or another
    try:
        for _ in range(rounds.warmup):
            for name in order.sample(names, len(names)):
                _seconds(variants[name], device, clock)
        start = clock()
        for number in range(max(rounds.count, MAX_ROUNDS)):
            if number >= rounds.count and clock() - start >= rounds.min_seconds:
                break
            for name in order.sample(names, len(names)):
                times[name].append(_seconds(variants[name], device, clock))
    finally:
        if collecting:
            gc.enable()
    return times


def _seconds(variant: Variant, device: torch.device, clock: Callable[[], float]) -> float:
    variant.before()
    _wait(device)
    start = clock()
    variant.run()
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
