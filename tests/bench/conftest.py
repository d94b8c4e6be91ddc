"""Configurations that measure `model=tiny` and narrow layers in a moment."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mixlora_cli.config import BenchConfig, BenchSettings, DataConfig, ModelConfig

QUICK = BenchSettings(
    quick=True,
    shapes=["32", "32x48"],
    dtypes=["fp32"],
    batches=[2],
    pools=[4, 8],
    tokens=8,
    rounds=3,
    warmup=0,
    min_seconds=0,
    precision="fp32",
    step_batch_size=2,
    answer_batch_size=2,
    max_new_tokens=2,
    instances=3,
    evaluation_rounds=1,
    predictions=160,
)

MakeConfig = Callable[..., BenchConfig]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage of other tests takes long to collect, before each case."""
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Eight pictures of one colour each."""
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    records = []
    for number in range(8):
        Image.new("RGB", (16 + number, 16), ("red", "green", "blue")[number % 3]).save(
            images / f"{number}.png"
        )
        question = "<image>\nWhich colour is it?" + " Look well." * (number % 3)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
        records.append(
            {"id": str(number), "task_name": "colour", "image": f"{number}.png", "conversations": turns}
        )
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records))
    return DataConfig(name="json", source="json", train=str(path), images=str(images))


@pytest.fixture
def make_config(tmp_path: Path, data: DataConfig) -> MakeConfig:
    """`make_config(parts=["layer"], ...)`: keywords of `BenchConfig` or of its settings."""

    def make(**values: Any) -> BenchConfig:
        top = {key: values.pop(key) for key in ("seed", "overwrite", "rank", "factors") if key in values}
        config = BenchConfig(
            model=ModelConfig(name="tiny", source="tiny"),
            data=data,
            bench=replace(QUICK, **values),
            output_dir=str(tmp_path / "bench"),
            rank=2,
            factors=4,
        )
        return replace(config, **top)

    return make
