"""Ten training and six held-out instances of each of two tasks; runs whose routing decides their output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis_fixtures import MakeRun, family, make_run, no_model, one_thread, own_cache  # noqa: F401
from mixlora_cli.config import DataConfig, ExportConfig, FitConfig
from tiny_data import settings_of, tiny_data
from tiny_runs import TINY

TASKS = ("counting", "naming things/now")

MakeConfig = Callable[..., ExportConfig]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny_data(tmp_path_factory.mktemp("data") / "records", train=TASKS * 10, heldout=TASKS * 6)


@pytest.fixture
def make_config(data: DataConfig) -> MakeConfig:
    """`make_config(run.root, per_task=True, overwrite=True)`: keywords of `FitConfig` or `ExportConfig`."""

    def make(run: Path, **values: Any) -> ExportConfig:
        fit = settings_of(FitConfig, values, batch_size=4, max_new_tokens=2, cache_features=False)
        whole = {"model": TINY, "data": data, "output_dir": str(run / "export"), **values}
        return ExportConfig(export=fit, run=str(run), **whole)

    return make
