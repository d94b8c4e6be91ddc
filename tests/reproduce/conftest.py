"""Folders of cells as `mixlora reproduce` leaves them, with answers of which a known number is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mixlora_cli.evaluation.predictions import Header, Prediction, open_predictions
from mixlora_cli.evaluation.scoring import score

NAMES = (
    "mini_textvqa",
    "mini_vsr",
    "mini_snli_ve",
    "mini_cifar10",
    "mini_cifar100",
    "mini_mnist",
    "mini_pope",
)
NUM_INSTANCES = 20
MakeCell = Callable[..., Path]


def _answers(benchmark: str, right: int, split: str, instances: int) -> list[Prediction]:
    labels = ("yes", "no") if benchmark in ("mini_vsr", "mini_pope") else ()
    people = ("yes",) * 10 if benchmark == "mini_textvqa" else ()
    given = ["yes" if i < right else "no" for i in range(instances)]
    return [
        Prediction(split, i, benchmark, str(i), f"{i}?", "yes", answer, labels=labels, answers=people)
        for i, answer in enumerate(given)
    ]


def _mme(right: int, instances: int) -> list[Prediction]:
    return [
        Prediction(
            *("unseen", i, "mini_mme", str(i), f"{i}?", "yes"),
            "yes" if i < right else "no",
            category="count",
            image_id=str(i // 2),
        )
        for i in range(instances)
    ]


@pytest.fixture
def make_cell(tmp_path: Path) -> MakeCell:
    """`make_cell("lora_r4", right=8, seed=1)`: so many answers of each benchmark right, or of each task in `seen`.

    With a `loss` each instance of these has it on every one of its two or more answer tokens.
    """

    def make(
        experiment: str,
        right: int,
        seed: int = 0,
        task: str | None = None,
        seen: tuple[str, ...] = (),
        used: float = 1.0,
        steps: int = 300,
        finished: bool = True,
        instances: int = NUM_INSTANCES,
        data: str | None = None,
        loss: float | None = None,
    ) -> Path:
        folder = tmp_path / f"{experiment}-{task}-{seed}-{used}"
        place = folder / ("eval-seen" if seen else "eval")
        answers = [each for name in seen for each in _answers(name, right, "heldout", instances)]
        if loss is not None:
            counts = [2 + each.index % 3 for each in answers]
            answers = [replace(each, nll=loss * n, tokens=n) for each, n in zip(answers, counts, strict=True)]
        if not seen:
            unseen = [each for name in NAMES for each in _answers(name, right, "unseen", instances)]
            answers = [*_mme(right, instances), *unseen]
        if finished:
            header = Header({"model": str(folder)}, len(answers), {"label": experiment, "limit": None})
            with open_predictions(place / "predictions.jsonl", header) as writer:
                writer.append(answers)
            score(place)
        about = {"steps": steps, "epochs": None, "batch": 8, "learning_rate": 1e-3}
        parts = {place.name: {"asked": {"data version": data}}} if data else {}
        record = {"experiment": experiment, "seed": seed, "task": task, "used": used, "parts": parts}
        folder.mkdir(parents=True, exist_ok=True)
        trained = {} if experiment == "llava_align" else about
        (folder / "cell.json").write_text(json.dumps({**record, "about": trained}))
        return folder

    return make
