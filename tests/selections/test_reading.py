"""Whose selections are read, what is refused before a model is built, and selections on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mixlora_cli.analysis.selections.reading import (
    Instances,
    Layer,
    Selections,
    SelectionStore,
    choose_instances,
    choose_layers,
    find_layers,
)
from mixlora_cli.analysis.selections.run import tsne
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError

from .conftest import SEEN, UNSEEN, MakeConfig, MakeRun

LAYERS = [Layer(0, "layers.0.mlp.gate_proj"), Layer(3, "layers.3.mlp.gate_proj")]
PRINT = {"adapter": "abc", "records": "def"}


def only(data: Any, split: str, keep: Callable[[int, dict[str, Any]], bool], folder: Path) -> Any:
    """The data with some of a split's records."""
    records = json.loads(Path(str(getattr(data, split))).read_text())
    path = folder / "few.json"
    path.write_text(json.dumps([record for number, record in enumerate(records) if keep(number, record)]))
    return replace(data, **{split: str(path)})


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("run", "values", "message"),
    [
        (["lora"], {}, "LORA adapter, which selects nothing"),
        (["full"], {}, "trained the model's own weights: nothing is selected there"),
        (["mixlora", "random"], {}, "give tsne.routing_seed=<number>"),
        (["mixlora", "task"], {"metadata": None}, "definition"),
        ([], {"output_dir": "."}, "holds a trained adapter"),
        ([], {"output_dir": "adapter"}, "holds a trained adapter"),
        ([], {"tasks": ["countin", UNSEEN[0]]}, "did you mean counting?"),
        ([], {"tasks": ["zzzz", UNSEEN[0]]}, "no such task"),
        ([], {"tasks": ["trained alone", UNSEEN[0]]}, "have no instance of it; there are: counting"),
        (
            [],
            {"tasks": ["mini_textvqa", SEEN[0]], "unseen": None},
            "tasks=mini_textvqa: the unseen and the held-out data have no instance of it (data.unseen=null)",
        ),
        ([], {"unseen": None}, "data.unseen=null: without tasks=[...] the unseen benchmarks are drawn"),
        ([], {"layers": [0, 2]}, "tsne.layers=2: the adapter has no such layer; it has 0 to 1"),
        ([], {"linear": "gate"}, "tsne.linear=gate: this adapter has down_proj, gate_proj"),
        ([], {"linear": "gate"}, "did you mean gate_proj?"),
    ],
)
def test_refused_in_one_line(
    run: list[str], values: dict[str, Any], message: str, make_run: MakeRun, make_config: MakeConfig
) -> None:
    root = make_run(*run).root
    changes = {key: value for key, value in values.items() if key in ("metadata", "unseen")}
    values = {key: value for key, value in values.items() if key not in changes}
    if "output_dir" in values:
        values["output_dir"] = str(root / values["output_dir"])
    config = make_config(root, **values)
    with pytest.raises(UserError) as caught:
        tsne(replace(config, data=replace(config.data, **changes)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_model")
def test_too_few_instances_or_tasks(make_run: MakeRun, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(make_run().root)
    few = only(config.data, "heldout", lambda number, _: number < 3, tmp_path)
    with pytest.raises(UserError, match="has 1 instance of it, a map needs at least 2"):
        tsne(replace(config, data=few, tasks=list(SEEN)))
    alone = only(config.data, "unseen", lambda _, record: record["benchmark"] == UNSEEN[0], tmp_path)
    with pytest.raises(UserError, match=rf"one task alone \({UNSEEN[0]}\)"):
        tsne(replace(config, data=alone))


def test_samples(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run(routing="random").root
    assert find_layers(make_config(run, routing_seed=1))[0].routing == "random"
    chosen = choose_instances(make_config(run, instances=3))
    # The unseen benchmarks in the paper's order.
    assert [(one.task, one.split, len(one.records), one.available) for one in chosen] == [
        (UNSEEN[0], "unseen", 3, 8),
        (UNSEEN[1], "unseen", 3, 8),
    ]
    mixed = choose_instances(make_config(run, pairs=[[SEEN[0], UNSEEN[1]], [SEEN[1], UNSEEN[0]]]))
    assert [(one.task, one.split) for one in mixed] == [
        (SEEN[0], "heldout"),
        (SEEN[1], "heldout"),
        (UNSEEN[1], "unseen"),
        (UNSEEN[0], "unseen"),
    ]
    drawn = [
        [[r.index for r in one.records] for one in choose_instances(make_config(run, instances=3, seed=seed))]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1] and any(other != drawn[0] for other in drawn[2:])


def test_first_middle_and_last_layer() -> None:
    def blocks(count: int) -> list[int]:
        return [one.block for one in choose_layers([Layer(n, f"{n}") for n in range(count)], None)]

    assert blocks(32) == [0, 15, 31]  # the paper's
    assert (blocks(30), blocks(2), blocks(1)) == ([0, 14, 29], [0, 1], [0])
    assert [one.block for one in choose_layers([Layer(n, "") for n in range(4)], [3, 1, 3])] == [3, 1]


def test_what_was_written_is_read_back_only_where_it_fits(tmp_path: Path) -> None:
    turns = (Turn("human", "What?"), Turn("gpt", "yes"))
    records = [Record(index, f"id{index}", "a task/1", (), turns) for index in (4, 7, 9)]
    instances = Instances("a task/1", "heldout", records, available=5, images=None)
    generator = np.random.default_rng(0)
    factors = {(layer.name, side): generator.integers(16, size=(3, 4)) for layer in LAYERS for side in "ab"}
    store = SelectionStore(tmp_path / "selections")
    assert store.base_of(instances, PRINT) is None
    store.write(instances, LAYERS, Selections([4, 7, 9], factors), PRINT, base="one")
    assert [path.name for path in store.folder.iterdir()] == [store.path(instances).name]
    found = store.read(instances, LAYERS[1:], ["a"])
    assert list(found.indices) == [4, 7, 9] and list(found.factors) == [(LAYERS[1].name, "a")]
    both = store.read(instances, LAYERS, ["b", "a"])
    for key, value in factors.items():
        np.testing.assert_array_equal(both.factors[key], value)

    rows = pq.read_table(store.path(instances)).to_pylist()  # what others read
    assert len(rows) == 3 * 2 * 2
    assert rows[4] == {
        "index": 7,
        "id": "id7",
        "split": "heldout",
        "task": "a task/1",
        "layer": LAYERS[0].name,
        "block": 0,
        "side": "b",
        "factors": factors[LAYERS[0].name, "b"][1].tolist(),
    }
    assert store.base_of(instances, PRINT) == "one"
    assert store.base_of(instances, PRINT | {"records": "other"}) is None
    store.path(instances).write_bytes(b"cut short")
    assert store.base_of(instances, PRINT) is None
