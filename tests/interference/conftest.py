"""A small data set of three tasks, and finished runs of the tiny model with strong adapters."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from mixlora_cli.config.interference import DrawConfig, GradientConfig, InterferenceConfig, MeasureConfig
from mixlora_cli.config.schema import (
    AdapterConfig,
    DataConfig,
    OptimConfig,
    RoutingConfig,
    TrainConfig,
)
from mixlora_cli.models.adapters import attach_adapter, save_adapter
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.training.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).parent))  # for interference_data

from interference_data import NUM_FACTORS, RANK, TASKS, TINY, MakeConfig, MakeRun

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
        adapter = AdapterConfig(name=name, dropout=0.1)  # type: ignore[arg-type]
        chosen = RoutingConfig(name=routing)  # type: ignore[arg-type]
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
