"""What cannot be drawn is said in one line, before a model is built; samples and layers by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.analysis.selections.reading import Layer, choose_instances, choose_layers, find_layers
from mixlora_cli.analysis.selections.run import tsne
from mixlora_cli.config import MapConfig, TsneConfig
from mixlora_cli.errors import UserError
from tiny_runs import TINY

from .conftest import SEEN, UNSEEN, MakeConfig, MakeRun


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("mixlora_cli.analysis.selections.reading.build_base", build)


def refused(config: Any) -> str:
    with pytest.raises(UserError) as caught:
        tsne(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_runs_that_select_nothing(make_run: MakeRun, make_config: MakeConfig, tmp_path: Path) -> None:
    assert "LORA adapter, which selects nothing" in refused(make_config(make_run("lora").root))
    assert "trained the model's own weights" in refused(make_config(make_run("full").root))
    run = make_run()
    run.result.unlink()
    assert "has not finished: continue it with" in refused(make_config(run.root))
    assert "is no run folder" in refused(make_config(tmp_path))
    assert "no such folder" in refused(make_config(tmp_path / "nowhere"))


def test_the_base_has_no_selections(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^run=null: give run=<folder"):
        replace(make_config(tmp_path), run=None)


def test_chance_needs_a_seed(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run(routing="random")
    assert "give tsne.routing_seed=<number>" in refused(make_config(run.root))
    assert find_layers(make_config(run.root, routing_seed=1))[0].routing == "random"


def test_tasks_that_are_not_there(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run().root
    assert "did you mean counting?" in refused(make_config(run, tasks=["countin", UNSEEN[0]]))
    assert "no such task" in refused(make_config(run, tasks=["zzzz", UNSEEN[0]]))
    assert "have no instance of it; there are: counting" in refused(
        make_config(run, tasks=["trained alone", UNSEEN[0]])
    )
    config = make_config(run, tasks=["mini_textvqa", SEEN[0]])
    message = refused(replace(config, data=replace(config.data, unseen=None)))
    assert message.startswith("tasks=mini_textvqa: the unseen") and "(data.unseen=null)" in message


def test_a_task_of_one_instance(make_run: MakeRun, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(make_run().root, tasks=list(SEEN))
    records = json.loads(Path(str(config.data.heldout)).read_text())[:3]
    (tmp_path / "few.json").write_text(json.dumps(records))
    few = replace(config, data=replace(config.data, heldout=str(tmp_path / "few.json")))
    assert "has 1 instance of it, a map needs at least 2" in refused(few)


def test_one_task_alone(make_run: MakeRun, make_config: MakeConfig, tmp_path: Path) -> None:
    run = make_run().root
    for tasks in (["counting"], ["counting", "counting"], []):
        with pytest.raises(ValueError, match=r"^tasks=\[.*must name two different tasks or more"):
            make_config(run, tasks=tasks)
    config = make_config(run)
    records = [
        r for r in json.loads(Path(str(config.data.unseen)).read_text()) if r["benchmark"] == UNSEEN[0]
    ]
    (tmp_path / "one.json").write_text(json.dumps(records))
    alone = replace(config, data=replace(config.data, unseen=str(tmp_path / "one.json")))
    assert f"one task alone ({UNSEEN[0]})" in refused(alone)
    assert "data.unseen=null: without tasks" in refused(
        replace(config, data=replace(config.data, unseen=None))
    )


def test_layers_that_are_not_there(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run().root
    assert "tsne.layers=2: the adapter has no such layer; it has 0 to 1" in refused(
        make_config(run, layers=[0, 2])
    )
    message = refused(make_config(run, linear="gate"))
    assert (
        message.startswith("tsne.linear=gate: this adapter has down_proj, gate_proj")
        and "gate_proj?" in message
    )


def test_routing_by_task_needs_definitions(make_run: MakeRun, make_config: MakeConfig) -> None:
    config = make_config(make_run(routing="task").root)
    assert "definition" in refused(replace(config, data=replace(config.data, metadata=None)))


def test_output_is_not_the_runs_own_folder(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run()
    for folder in (run.root, run.adapter):
        assert "holds a trained adapter" in refused(make_config(run.root, output_dir=str(folder)))


def test_tasks_or_pairs(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^pairs=.*not both"):
        make_config(tmp_path, tasks=["a", "b"], pairs=[["a", "b"]])
    for pairs in ([["a"]], [["a", "a"]], []):
        with pytest.raises(ValueError, match=r"^pairs=.*must be \[\[seen,unseen\],...\]"):
            make_config(tmp_path, pairs=pairs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("instances", 1),
        ("neighbours", 0),
        ("batch_size", 0),
        ("perplexity", 0.5),
        ("permutations", 19),
        ("page_mb", -1.0),
        ("sides", []),
        ("layers", []),
        ("routing_seed", -1),
    ],
)
def test_values_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^tsne\.{key}="):
        MapConfig(**{key: value})  # type: ignore[arg-type]


def test_seed_out_of_range(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^seed=-1"):
        make_config(tmp_path, seed=-1)
    assert TsneConfig(TINY, make_config(tmp_path).data, MapConfig(), "out", run="here").seed == 0


def test_samples(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run().root
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
