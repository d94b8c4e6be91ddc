"""A small data set, and finished runs of the tiny model with adapters so large that routing decides their output."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mixlora_cli.config import DataConfig, ExportConfig, FitConfig
from mixlora_cli.training.run_folder import RunFolder
from tiny_runs import TINY, finished_run

TASKS = ("counting", "naming things/now")

MakeRun = Callable[..., RunFolder]
MakeConfig = Callable[..., ExportConfig]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Ten training and six held-out instances of each of two tasks; every seventh is without a picture."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    generator = random.Random(0)
    for split, count in (("train", 20), ("heldout", 12)):
        records = []
        for number in range(count):
            name = f"{split}{number}.png"
            Image.frombytes("RGB", (16, 16), generator.randbytes(16 * 16 * 3)).save(root / "images" / name)
            question = "What is it? " + " ".join(
                generator.choices(["red", "big", "dog", "left", "seven"], k=number % 5)
            )
            turns = [("human", question), ("gpt", generator.choice(["yes", "seven dogs", "no"]))]
            record: dict[str, Any] = {
                "id": str(number),
                "task_name": TASKS[number % 2],
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
            if number % 7:
                record["image"] = name
            records.append(record)
        (root / f"{split}.json").write_text(json.dumps(records))
    (root / "definitions.json").write_text(json.dumps({t: {"definition": f"Do {t}."} for t in TASKS}))
    return DataConfig(
        name="json",
        source="json",
        train=str(root / "train.json"),
        heldout=str(root / "heldout.json"),
        images=str(root / "images"),
        metadata=str(root / "definitions.json"),
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_run(tmp_path: Path, data: DataConfig) -> MakeRun:
    """`make_run("lora")`, `make_run(pool="prompt")`: what `mixlora train` leaves, without the training."""

    def make(name: str = "mixlora", routing: str = "instance", **fields: Any) -> RunFolder:
        return finished_run(tmp_path / f"run-{name}-{routing}", data, name, routing, **fields)

    return make


@pytest.fixture
def make_config(data: DataConfig) -> MakeConfig:
    """`make_config(run.root, per_task=True, overwrite=True)`: keywords of `FitConfig` or `ExportConfig`."""

    def make(run: Path, **values: Any) -> ExportConfig:
        top = {
            key: values.pop(key)
            for key in ("output_dir", "overwrite", "seed", "data", "model")
            if key in values
        }
        fit = FitConfig(**{"batch_size": 4, "max_new_tokens": 2, "cache_features": False, **values})
        whole = {"model": TINY, "data": data, "output_dir": str(run / "export"), **top}
        return ExportConfig(export=fit, run=str(run), **whole)

    return make
