"""Selections on disk: read back as written, in the instances' order, and only where nothing they depend on changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mixlora_cli.analysis.selections.reading import Instances, Layer, Selections, SelectionStore
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import Turn

LAYERS = [Layer(0, "layers.0.mlp.gate_proj"), Layer(3, "layers.3.mlp.gate_proj")]
PRINT = {"adapter": "abc", "records": "def"}


@pytest.fixture
def instances() -> Instances:
    turns = (Turn("human", "What?"), Turn("gpt", "yes"))
    records = [Record(index, f"id{index}", "a task/1", None, turns) for index in (4, 7, 9)]
    return Instances("a task/1", "heldout", records, available=5, images=None)


@pytest.fixture
def selections() -> Selections:
    generator = np.random.default_rng(0)
    read = {(layer.name, side): generator.integers(16, size=(3, 4)) for layer in LAYERS for side in "ab"}
    return Selections([4, 7, 9], read)


def test_round_trip(tmp_path: Path, instances: Instances, selections: Selections) -> None:
    store = SelectionStore(tmp_path / "selections")
    assert store.base_of(instances, PRINT) is None
    store.write(instances, LAYERS, selections, PRINT, base="one")
    found = store.read(instances, LAYERS[1:], ["a"])
    assert list(found.indices) == [4, 7, 9] and list(found.factors) == [(LAYERS[1].name, "a")]
    np.testing.assert_array_equal(found.factors[LAYERS[1].name, "a"], selections.factors[LAYERS[1].name, "a"])
    both = store.read(instances, LAYERS, ["b", "a"])
    for key, value in selections.factors.items():
        np.testing.assert_array_equal(both.factors[key], value)


def test_file_is_readable_by_others(tmp_path: Path, instances: Instances, selections: Selections) -> None:
    store = SelectionStore(tmp_path)
    store.write(instances, LAYERS, selections, PRINT, base="one")
    assert [path.name for path in tmp_path.iterdir()] == [store.path(instances).name]
    rows = pq.read_table(store.path(instances)).to_pylist()
    assert len(rows) == 3 * 2 * 2
    assert rows[4] == {
        "index": 7,
        "id": "id7",
        "split": "heldout",
        "task": "a task/1",
        "layer": LAYERS[0].name,
        "block": 0,
        "side": "b",
        "factors": selections.factors[LAYERS[0].name, "b"][1].tolist(),
    }


def test_only_what_fits_is_used(tmp_path: Path, instances: Instances, selections: Selections) -> None:
    store = SelectionStore(tmp_path)
    store.write(instances, LAYERS, selections, PRINT, base="one")
    assert store.base_of(instances, PRINT) == "one"
    assert store.base_of(instances, PRINT | {"records": "other"}) is None
    store.path(instances).write_bytes(b"cut short")
    assert store.base_of(instances, PRINT) is None
