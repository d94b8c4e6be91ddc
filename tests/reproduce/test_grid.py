"""`mixlora reproduce table2` for real: trainings and evaluations of the tiny model in processes of their own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

NAMES = (
    "mini_textvqa",
    "mini_vsr",
    "mini_snli_ve",
    "mini_cifar10",
    "mini_cifar100",
    "mini_mnist",
    "mini_pope",
)


def record(number: int, question: str, answer: str, **more: object) -> dict[str, object]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {
        "id": str(number),
        "task_name": f"task{number % 2}",
        "image": f"{number % 4}.png",
        "conversations": turns,
        **more,
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    draw = random.Random(0)
    for number in range(4):
        Image.frombytes("RGB", (16, 16), draw.randbytes(768)).save(tmp_path / "images" / f"{number}.png")
    train = [record(number, "Which colour?", ("red", "blue")[number % 2]) for number in range(8)]
    unseen = [
        record(len(NAMES) * number + place, f"What is {number}?", ("yes", "no")[number % 2], benchmark=name)
        for number in range(2)
        for place, name in enumerate(NAMES)
    ]
    unseen += [
        record(
            100 + number,
            "Is it?",
            ("yes", "no")[number],
            benchmark="mini_mme",
            category="count",
            image_id="0",
        )
        for number in range(2)
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "unseen.json").write_text(json.dumps(unseen))
    (tmp_path / "tasks.json").write_text(json.dumps({"task0": "Name the colour."}))
    return tmp_path


def reproduce(folder: Path) -> subprocess.CompletedProcess[str]:
    train = ["model=tiny", "data=json", "data.train=train.json", "data.images=images", "train.batch_size=2"]
    train += ["train.log_every=1", "train.cache_features=false", "data.metadata=tasks.json"]
    evaluation = ["data=json", "data.unseen=unseen.json", "data.images=images", "eval.cache_features=false"]
    evaluation += ["eval.max_new_tokens=2"]
    return subprocess.run(
        [
            *(sys.executable, "-m", "mixlora_cli.cli", "reproduce", "table2", "seeds=[0]", "budget=2"),
            *(f"train={json.dumps(train)}", f"evaluation={json.dumps(evaluation)}", "output_dir=cells"),
        ],
        cwd=folder,
        env={**os.environ, "MIXLORA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_row_fails_the_others_make_the_table_and_nothing_is_run_twice(data: Path) -> None:
    """The file of task definitions lacks one of the tasks, so routing=task cannot train."""
    first = reproduce(data)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "table2 at scale mini: 3 cells, 0 there, 3 trainings and 3 other parts to do" in first.stdout
    assert "[1/3] routing_random seed 0: done" in first.stdout
    assert "routing_task seed 0: train failed, exit code 2" in first.stderr
    (log,) = data.glob("cells/routing_task-seed0-*/train.log")
    assert str(log.relative_to(data)) in first.stderr and "definition" in log.read_text()
    lines = (data / "cells" / "tables" / "table2.md").read_text().splitlines()
    task = next(line for line in lines if line.startswith("| MixLoRA | Task |"))
    assert task == "| MixLoRA | Task | 32 | 4 | - | - |"
    assert "Missing, shown as -: Task routing." in lines
    (random_cell,) = data.glob("cells/routing_random-seed0-*")
    assert json.loads((random_cell / "result.json").read_text())["steps"] == 2
    assert not (random_cell / "checkpoints").exists()
    before = (random_cell / "train.log").stat().st_mtime_ns

    again = reproduce(data)
    assert again.returncode == 1
    assert "2 there, 1 trainings and 1 other parts to do" in again.stdout
    assert "[1/3] routing_random seed 0: there" in again.stdout
    assert (random_cell / "train.log").stat().st_mtime_ns == before
