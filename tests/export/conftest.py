"""A small data set, and finished runs of the tiny model with adapters so large that routing decides their output."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from mixlora_cli.config.export import ExportConfig, FitConfig
from mixlora_cli.config.schema import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
    TrainConfig,
)
from mixlora_cli.models.adapters import attach_adapter, save_adapter
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.training.run_folder import RunFolder

TINY = ModelConfig(name="tiny", source="tiny")
NUM_FACTORS, RANK = 6, 2
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

    def make(
        name: str = "mixlora", routing: str = "instance", train_projector: bool = False, **fields: Any
    ) -> RunFolder:
        adapter = AdapterConfig(name=name, dropout=0.1)  # type: ignore[arg-type]
        chosen = RoutingConfig(name=routing, **fields)  # type: ignore[arg-type]
        torch.manual_seed(0)
        model = attach_adapter(build_tiny().model, adapter, chosen, RANK, NUM_FACTORS, train_projector)
        for parameter_name, parameter in model.named_parameters():
            if "mixlora_router" in parameter_name:
                parameter.data = torch.randn(parameter.shape)
            elif parameter.requires_grad:
                parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
        run = RunFolder(tmp_path / f"run-{name}-{routing}")
        save_adapter(model, run.adapter)
        train = OptimConfig(precision="fp32")
        config = TrainConfig(TINY, adapter, chosen, data, train, RANK, NUM_FACTORS, str(run.root))
        OmegaConf.save(OmegaConf.create(asdict(config)), run.config)
        run.result.write_text("{}")
        return run

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
