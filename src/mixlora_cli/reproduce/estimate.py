"""How long a grid should take, before anything has run; and how long the rest takes, from what has."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import cache

from mixlora_cli.config import EvalConfig, PlanConfig, ReproduceConfig, TrainConfig
from mixlora_cli.data.mini.build import mini_root
from mixlora_cli.data.mini.plan import Counts
from mixlora_cli.data.mini.seen import SEEN_TASKS
from mixlora_cli.errors import UserError
from mixlora_cli.reproduce.compose import composed

SECONDS = 3600.0


def train_seconds(config: ReproduceConfig, asked: TrainConfig, arguments: Sequence[str]) -> float | None:
    """Of a training: mini at the known speed of LoRA, paper as `mixlora plan` says. None where nobody knows.

    MixLoRA and full tuning take longer than LoRA; the time left that is shown later corrects that.
    """
    if config.scale == "paper":
        return _planned(arguments)
    if asked.train.steps is None:
        return None
    passes = asked.train.effective_batch or asked.train.batch_size * asked.train.accumulation
    return asked.train.steps * passes / config.speed.train


def _planned(arguments: Sequence[str]) -> float | None:
    from mixlora_cli.analysis.plan import (
        make_plan,  # loads the model libraries, which mini does without
    )

    kept = [text for text in arguments if not text.startswith("resume=")]
    try:
        return make_plan(composed("plan", PlanConfig, kept)).schedule.hours * SECONDS
    except UserError:
        return None


def answer_seconds(config: ReproduceConfig, asked: EvalConfig) -> float | None:
    """Of an evaluation on the built-in data, at the known speed; None for other data."""
    if asked.data.source != "mini":
        return None
    limit = asked.eval.limit
    if asked.eval.benchmarks == []:
        sizes = [Counts().heldout] * len(asked.data.tasks or SEEN_TASKS)
    else:
        sizes = list(_unseen_sizes().values())
    return sum(size if limit is None else min(size, limit) for size in sizes) / config.speed.answer


@cache
def _unseen_sizes() -> Counter[str]:
    """Instances of each unseen benchmark of the built-in data, which is drawn on first use as a training would."""
    records = json.loads((mini_root() / "unseen.json").read_text(encoding="utf-8"))
    return Counter(str(record["benchmark"]) for record in records)


def total(seconds: Iterable[float | None]) -> tuple[float, int]:
    """Sum of what is known, and how many are not."""
    known, unknown = 0.0, 0
    for each in seconds:
        if each is None:
            unknown += 1
        else:
            known += each
    return known, unknown


def time_left(done: Sequence[tuple[float | None, float]], rest: Sequence[float | None]) -> float | None:
    """Seconds that the `rest` takes, its estimates corrected by how the finished parts kept theirs.

    Args:
        done: (estimate, what it took) of each finished part.
        rest: Estimates of what is left.

    Where parts have no estimate, the mean of the finished ones stands for each; None without any clue.
    """
    known = [(estimate, took) for estimate, took in done if estimate]
    factor = sum(took for _, took in known) / sum(estimate for estimate, _ in known) if known else 1.0
    sure, unknown = total(rest)
    if not unknown:
        return factor * sure
    if not done:
        return None
    return factor * sure + unknown * sum(took for _, took in done) / len(done)


def in_words(seconds: float | None) -> str:
    """`1:02:03`, or a question mark."""
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))
