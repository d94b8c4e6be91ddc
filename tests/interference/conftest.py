"""A small data set of three tasks, and finished runs of the tiny model with strong adapters."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mixlora_cli.config import DataConfig, DrawConfig, GradientConfig, InterferenceConfig, MeasureConfig
from mixlora_cli.training.run_folder import RunFolder
from tiny_runs import TINY, finished_run

sys.path.insert(0, str(Path(__file__).parent))  # for interference_data

from interference_data import TASKS, MakeConfig, MakeRun

ANSWERS = (("yes", "no"), ("no dog", "seven dogs"), ("red circle", "7"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Eight training instances of each of three tasks; one of a fourth task."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    generator = random.Random(0)
    records = []
    for number in range(25):
        name = f"{number}.png"
        Image.frombytes("RGB", (16, 16), generator.randbytes(16 * 16 * 3)).save(root / "images" / name)
        question = "What is it? " + " ".join(generator.choices(["red", "big", "dog", "left"], k=number % 5))
        turns = [("human", question), ("gpt", generator.choice(ANSWERS[number % 3]))]
        record: dict[str, Any] = {
            "id": str(number),
            "task_name": "rare" if number == 24 else TASKS[number % 3],
            "conversations": [{"from": who, "value": text} for who, text in turns],
        }
        if number % 7:
            record["image"] = name
        records.append(record)
    (root / "train.json").write_text(json.dumps(records))
    (root / "definitions.json").write_text(json.dumps({t: {"definition": f"Do {t}."} for t in TASKS}))
    return DataConfig(
        name="json",
        source="json",
        train=str(root / "train.json"),
        images=str(root / "images"),
        metadata=str(root / "definitions.json"),
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_run(tmp_path: Path, data: DataConfig) -> MakeRun:
    """`make_run("lora")`, `make_run(routing="random")`: what `mixlora train` leaves, without the training."""

    def make(name: str = "mixlora", routing: str = "instance", train_projector: bool = False) -> RunFolder:
        return finished_run(tmp_path / f"run-{name}-{routing}", data, name, routing, train_projector)

    return make


@pytest.fixture
def make_config(data: DataConfig) -> MakeConfig:
    """`make_config(run.root, batches=2, lambdas=[0.1], compare=...)`: keywords of all its dataclasses."""

    def make(run: Path, **values: Any) -> InterferenceConfig:
        def part(kind: Any, defaults: dict[str, Any]) -> Any:
            keys = [key for key in values if key in kind.__dataclass_fields__]
            return kind(**{**defaults, **{key: values.pop(key) for key in keys}})

        measure = MeasureConfig(lambdas=values.pop("lambdas", None))
        gradients = part(GradientConfig, {"batches": 3, "batch_size": 2, "cache_features": False})
        drawn = part(DrawConfig, {})
        whole = {
            "output_dir": str(run / "interference"),
            "tasks": list(TASKS),
            "data": data,
            **values,
        }
        return InterferenceConfig(
            model=TINY, interference=gradients, draw=drawn, measure=measure, run=str(run), **whole
        )

    return make
