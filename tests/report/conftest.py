"""Evaluation folders with pictures."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from report_folder import COLOURS, picture, prediction, write_folder

from mixlora_cli.evaluation.predictions import Prediction


def answers(seed: int) -> list[Prediction]:
    """Thirty colours, twelve MME questions, nine of POPE, six words, eight of a seen task."""
    rng = random.Random(seed)
    found: list[Prediction] = []

    def add(benchmark: str, target: str, given: str, **more: Any) -> None:
        found.append(prediction(len(found), benchmark, target, given, **more))

    for number in range(30):
        add("mini_cifar10", COLOURS[number % 3], rng.choice([*COLOURS, "a dog"]), labels=COLOURS)
    for number in range(12):
        add(
            "mini_mme",
            ("yes", "no")[number % 2],
            rng.choice(["Yes", "no", "perhaps"]),
            category=("count", "color")[number // 2 % 2],
            image_id=f"m{number // 2}",
        )
    for number in range(9):
        add("mini_pope", ("yes", "no")[number % 2], rng.choice(["yes", "No."]), category="random")
    for _ in range(6):
        add("mini_textvqa", "stop", rng.choice(["stop", "sto", "go"]), answers=("stop",) * 2 + ("sto",) * 8)
    for number in range(8):
        add("naming", str(number), rng.choice([str(number), "x"]), split="heldout")
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(4):
        picture(tmp_path / "images" / f"{number}.png", number)
    return tmp_path / "images"


@pytest.fixture
def folder(tmp_path: Path, images: Path) -> Path:
    return write_folder(tmp_path / "one" / "eval", answers(0), images)


@pytest.fixture
def other(tmp_path: Path, images: Path) -> Path:
    return write_folder(tmp_path / "two" / "eval", answers(1), images, label="MixLoRA E=16 r=4")
