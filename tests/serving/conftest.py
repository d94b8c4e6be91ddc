"""A training's data, and finished runs on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis_fixtures import make_run, one_thread, own_cache  # noqa: F401
from mixlora_cli.config import DataConfig
from tiny_data import tiny_data


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return tiny_data(tmp_path / "data", train=["counting", "reading", "naming"] * 5 + ["counting"] * 6)
