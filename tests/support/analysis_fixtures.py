"""What all tests of commands that look at an adapter take for granted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tiny model is slower with more."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found in a cache, and nothing left there."""
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
