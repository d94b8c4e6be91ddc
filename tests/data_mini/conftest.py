"""The small data set: planned completely once, drawn with few instances once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.data.mini.build import build_mini
from mixlora_cli.data.mini.plan import Counts, Plan, make_plan


@pytest.fixture(scope="session")
def full_plan() -> Plan:
    """Every instance that users get, without pixels."""
    return make_plan(Counts())


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set on disk with few instances of everything."""
    root = tmp_path_factory.mktemp("cache") / "mini-few"
    build_mini(root, progress=False, counts=Counts(train=6, heldout=3, unseen=0.1))
    return root


@pytest.fixture(scope="session")
def read_records(built: Path) -> Mapping[str, list[dict[str, Any]]]:
    return {
        split: json.loads((built / f"{split}.json").read_text()) for split in ("train", "heldout", "unseen")
    }
