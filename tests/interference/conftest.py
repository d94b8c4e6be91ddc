"""Eight instances of each of three tasks, finished runs of the tiny model, and how they are to be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis_fixtures import MakeRun, family, make_run, no_model, one_thread, own_cache  # noqa: F401
from mixlora_cli.config import DataConfig, DrawConfig, GradientConfig, InterferenceConfig, MeasureConfig
from tiny_data import settings_of, tiny_data
from tiny_runs import TINY

TASKS = ("counting", "naming things/now", "reading")

MakeConfig = Callable[..., InterferenceConfig]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data") / "records", seed=3, train=[*TASKS * 8, "rare"])


@pytest.fixture
def make_config(data: DataConfig) -> MakeConfig:
    """`make_config(run.root, batches=2, lambdas=[0.1], compare=...)`: keywords of all its dataclasses."""

    def make(run: Path, **values: Any) -> InterferenceConfig:
        measure = MeasureConfig(lambdas=values.pop("lambdas", None))
        gradients = settings_of(GradientConfig, values, batches=3, batch_size=2, cache_features=False)
        whole = {"output_dir": str(run / "interference"), "tasks": list(TASKS), "data": data, **values}
        return InterferenceConfig(
            model=TINY, interference=gradients, draw=DrawConfig(), measure=measure, run=str(run), **whole
        )

    return make
