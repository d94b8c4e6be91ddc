"""Stored predictions to score, as many as are asked for: what a full evaluation of the paper's benchmarks leaves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from mixlora_cli.benchmarks.metrics import MME, POPE, VQA
from mixlora_cli.benchmarks.registry import BENCHMARKS, FROM_THE_PAPER
from mixlora_cli.evaluation.predictions import FILE_NAME, Header, Prediction, open_predictions

_CHUNK = 1_000
_ANSWERS = ("yes", "no")
_PEOPLE = 10


def write_predictions(folder: Path, count: int, seed: int) -> None:
    """`count` answers to the paper's eight benchmarks in turn, right and wrong, as `mixlora eval` writes them."""
    header = Header({"made up": str(seed)}, count, {"label": "made up"})
    predictions = _predictions(count, random.Random(seed))
    with open_predictions(folder / FILE_NAME, header) as writer:
        while chunk := [prediction for _, prediction in zip(range(_CHUNK), predictions, strict=False)]:
            writer.append(chunk)


def _predictions(count: int, rng: random.Random) -> Iterator[Prediction]:
    labels = tuple(f"label {number}" for number in range(10))
    for number in range(count):
        benchmark = BENCHMARKS[FROM_THE_PAPER[number % len(FROM_THE_PAPER)]]
        pair = number // len(FROM_THE_PAPER) // 2
        yes_no = benchmark.metric in (MME, POPE)
        choices = _ANSWERS if yes_no else labels
        target = rng.choice(choices)
        yield Prediction(
            split="unseen",
            index=number,
            benchmark=benchmark.name,
            id=f"{benchmark.name}-{number}",
            question="What is the object in the image? Please only answer a single object.",
            target=target,
            prediction=f"It is {rng.choice(choices)}." if rng.random() < 0.5 else target,
            category=f"part {pair % 14}" if yes_no else "",
            image_id=f"image {pair}" if yes_no else "",
            answers=(target,) * _PEOPLE if benchmark.metric is VQA else (),
            labels=() if yes_no or benchmark.metric is VQA else labels,
        )
