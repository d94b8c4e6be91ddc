"""Configurations that measure `model=tiny` and narrow layers in a moment."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis_fixtures import family, one_thread, own_cache  # noqa: F401
from mixlora_cli.config import BenchConfig, BenchSettings, ModelConfig
from tiny_data import tiny_data

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
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage of other tests takes long to collect, before each case."""
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """`make_config(parts=["layer"], ...)`: keywords of `BenchConfig` or of its settings."""
    data = tiny_data(tmp_path / "data", train=["counting", "reading"] * 4)

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
