"""Real pictures of MNIST, CIFAR-10 and CIFAR-100, read from the installed package `foolbox` (20 of each)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import datasets
import pytest

datasets.disable_progress_bars()

COLUMNS = {"mnist": ("image", "label"), "cifar10": ("img", "label"), "cifar100": ("img", "fine_label")}
"""As on the hub."""


def foolbox_pictures(name: str) -> list[tuple[Path, int]]:
    """Files and labels: `cifar100_00_49.png` is the first of CIFAR-100, of class 49."""
    found = importlib.util.find_spec("foolbox")  # its code is not imported: that needs more packages
    if found is None or not found.submodule_search_locations:
        pytest.fail("the package foolbox is not installed: pip install --no-deps foolbox")
    folder = Path(found.submodule_search_locations[0]) / "data"
    files = sorted(folder.glob(f"{name}_*.png"))
    assert len(files) == 20
    return [(file, int(file.stem.split("_")[2])) for file in files]


def foolbox_rows(name: str) -> list[dict[str, Any]]:
    """Rows as on the hub, pictures encoded."""
    picture, label = COLUMNS[name]
    return [
        {picture: {"bytes": file.read_bytes(), "path": file.name}, label: number}
        for file, number in foolbox_pictures(name)
    ]


def table(name: str, rows: list[dict[str, Any]], names: list[str] | None = None) -> datasets.Dataset:
    """A data set with the features that the hub's has; `names` of the classes."""
    picture, label = COLUMNS[name]
    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    return datasets.Dataset.from_list(
        rows, features=datasets.Features({picture: datasets.Image(), label: kind})
    )
