"""Synthetic checkpoints in the published layout, and the importer run on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import published_code
from mixlora_cli.config import ImportConfig
from mixlora_cli.errors import UserError
from mixlora_cli.prepare.original_checkpoint import import_checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Folder of a whole checkpoint with CFS and a projector of two layers."""
    return published_code.write(tmp_path / "checkpoint")


@pytest.fixture
def run_import(tmp_path: Path) -> Callable[..., Path]:
    """`run_import(folder, **options)` -> the adapter folder."""

    def run(folder: Path, **options: object) -> Path:
        return import_checkpoint(ImportConfig(folder, tmp_path / "adapter", **options))  # type: ignore[arg-type]

    return run


@pytest.fixture
def refuses(run_import: Callable[..., Path]) -> Callable[..., None]:
    """`refuses(folder, expected, **options)`: one line that matches, and nothing is left behind."""

    def check(folder: Path, expected: str, **options: object) -> None:
        before = sorted(folder.parent.iterdir())
        with pytest.raises(UserError, match=expected) as error:
            run_import(folder, **options)
        assert "\n" not in str(error.value)
        assert sorted(folder.parent.iterdir()) == before

    return check
