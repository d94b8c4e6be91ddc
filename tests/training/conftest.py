"""A little data set on disk and configurations that train `model=tiny` on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from mixlora_cli.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
    TrainConfig,
)
from mixlora_cli.training import train as run_module
from mixlora_cli.training.run_folder import RunFolder
from mixlora_cli.training.train import train

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
NUM_RECORDS = 12

MakeConfig = Callable[..., TrainConfig]


def write_data(folder: Path) -> DataConfig:
    """Twelve pictures of one colour each; answers of different lengths, one record without a picture, one with two."""
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
        if number == 7:
            record["image"] = ["7.png", "3.png"]
            record["conversations"][0]["value"] = "Is <image> of the colour of <image>?"
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
    return config_maker(tmp_path, data)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunFolder]:
    """`trained("mixlora")`: a finished run of seven steps, three an epoch, to be read only; each is trained once."""
    root = tmp_path_factory.mktemp("trained")
    make = config_maker(root, write_data(root))

    @cache
    def run(adapter: str) -> RunFolder:
        return RunFolder(train(make(adapter, adapter, steps=7)))

    return run


def config_maker(root: Path, data: DataConfig) -> MakeConfig:
    """Configurations with output folders in `root`."""

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
            output_dir=str(root / folder),
        )
        return replace(config, **top)

    return make


WEIGHTS = {"full": "trained_weights.safetensors"}


def adapter_weights(run: Path, name: str = "mixlora") -> dict[str, Tensor]:
    """What a run trained."""
    return load_file(run / "adapter" / WEIGHTS.get(name, "adapter_model.safetensors"))


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def each_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Call `action(step)` at the end of each step, before our own callbacks see it."""

    class Act(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            action(state.global_step)

    build = run_module.build_trainer

    def build_with_action(*arguments: Any, **more: Any) -> Any:
        return build(*arguments[:-1], [Act(), *arguments[-1]], **more)

    monkeypatch.setattr(run_module, "build_trainer", build_with_action)
