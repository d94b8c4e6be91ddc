"""A little data set on disk and configurations that train `model=tiny` on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixlora_cli.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
    TrainConfig,
)

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
NUM_RECORDS = 12

MakeConfig = Callable[..., TrainConfig]


def write_data(folder: Path) -> DataConfig:
    """Twelve pictures of one colour each; answers of different lengths, one record without a picture."""
    images = folder / "images"
    images.mkdir()
    records = []
    for number in range(NUM_RECORDS):
        colour = COLOURS[number % len(COLOURS)]
        Image.new("RGB", (20 + number, 16), colour).save(images / f"{number}.png")
        answer = " ".join([colour] * (1 + number % 4))
        record: dict[str, Any] = {
            "id": str(number),
            "task_name": f"task{number % 2}",
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich colour is it?" + " Look well." * (number % 3)},
                {"from": "gpt", "value": answer},
            ],
        }
        if number == 5:
            del record["image"]
            record["conversations"][0]["value"] = "Say white."
        records.append(record)
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return DataConfig(name="json", source="json", train=str(path), images=str(images))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """`write_data` and a cache of their own."""
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    return write_data(tmp_path)


@pytest.fixture
def make_config(tmp_path: Path, data: DataConfig) -> MakeConfig:
    """`make_config("run", steps=3, adapter="lora", ...)`: keywords of `OptimConfig`, `TrainConfig` or the adapter."""

    def make(folder: str, adapter: str = "mixlora", dropout: float = 0.1, **values: Any) -> TrainConfig:
        top = {
            key: values.pop(key) for key in ("seed", "resume", "overwrite", "model", "wandb") if key in values
        }
        optim = OptimConfig(
            **{
                "steps": 2,
                "batch_size": 4,
                "learning_rate": 1e-2,
                "precision": "fp32",
                "log_every": 1,
                "cache_features": False,
                **values,
            }
        )
        config = TrainConfig(
            model=ModelConfig(name="tiny", source="tiny"),
            adapter=AdapterConfig(name=adapter, dropout=dropout),  # type: ignore[arg-type]
            routing=RoutingConfig(name="instance"),
            data=data,
            train=optim,
            rank=2,
            factors=4,
            output_dir=str(tmp_path / folder),
        )
        return replace(config, **top)

    return make
