"""What all tests of commands that look at an adapter take for granted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_family
from mixlora_cli.config import DataConfig, ModelConfig
from mixlora_cli.training.run_folder import RunFolder
from tiny_runs import finished_run

MakeRun = Callable[..., RunFolder]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tiny model is slower with more."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found in a cache, and nothing left there."""
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_run(tmp_path: Path, data: DataConfig) -> MakeRun:
    """`make_run("lora")`, `make_run(pool="prompt")`: what `mixlora train` leaves, without the training."""

    def make(name: str = "mixlora", routing: str = "instance", **fields: Any) -> RunFolder:
        return finished_run(tmp_path / f"run-{name}-{routing}", data, name, routing, **fields)

    return make


@pytest.fixture
def family(request: pytest.FixtureRequest, tmp_path: Path) -> ModelConfig:
    """Named by the test's parameter: a folder with a small model of its real class."""
    folder = make_family(request.param, tmp_path / request.param)
    return ModelConfig(request.param, "hub", str(folder), attn_implementation="sdpa")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may load one."""

    def build(*_: object) -> None:
        raise AssertionError("a model was built")

    for module in ("export.run", "interference.run", "selections.reading"):
        monkeypatch.setattr(f"mixlora_cli.analysis.{module}.build_base", build)
