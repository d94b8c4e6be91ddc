"""What cannot be exported is said in one line, before a model is built; samples never overlap; intervals by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixlora_cli.analysis.export.comparison import mean_over_tasks
from mixlora_cli.analysis.export.run import choose_inputs, export, folder_names
from mixlora_cli.config import FitConfig
from mixlora_cli.errors import UserError
from mixlora_cli.stats import wilson
from tiny_runs import NUM_FACTORS

from .conftest import TASKS, MakeConfig, MakeRun


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("mixlora_cli.analysis.export.run.build_base", build)


def refused(config: Any) -> str:
    with pytest.raises(UserError) as caught:
        export(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_adapters_that_are_static_already(make_run: MakeRun, make_config: MakeConfig) -> None:
    lora, full = make_run("lora"), make_run("full")
    message = refused(make_config(lora.root))
    assert "LORA adapter, which is static already" in message and str(lora.adapter) in message
    assert "there is nothing to export" in refused(make_config(full.root))


def test_no_finished_run(make_run: MakeRun, make_config: MakeConfig, tmp_path: Path) -> None:
    run = make_run()
    run.result.unlink()
    assert "has not finished: continue it with" in refused(make_config(run.root))
    assert "is no run folder" in refused(make_config(tmp_path))
    assert "no such folder" in refused(make_config(tmp_path / "nowhere"))


def test_values_that_do_not_fit_the_adapter_or_the_data(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run()
    too_high = make_config(run.root, rank=NUM_FACTORS + 1)
    assert f"export.rank={NUM_FACTORS + 1}: must be <= {NUM_FACTORS}" in refused(too_high)
    assert "did you mean counting?" in refused(make_config(run.root, tasks=["countin"]))
    no_heldout = replace(too_high.data, heldout=None)
    assert refused(make_config(run.root, data=no_heldout)).startswith("data.heldout=null: comparing needs")
    no_unseen = make_config(run.root, split="unseen")
    assert refused(no_unseen).startswith("data.unseen=null")
    by_chance = make_run(routing="random")
    assert "chance selects alike for every task" in refused(make_config(by_chance.root, per_task=True))


def test_routing_by_task_needs_definitions(make_run: MakeRun, make_config: MakeConfig) -> None:
    config = make_config(make_run(routing="task").root)
    assert "definition" in refused(replace(config, data=replace(config.data, metadata=None)))


def test_folders_that_hold_something_else(make_run: MakeRun, make_config: MakeConfig, tmp_path: Path) -> None:
    run = make_run()
    for folder in (run.root, run.adapter):
        config = make_config(run.root, output_dir=str(folder), overwrite=True)
        assert "holds a trained adapter" in refused(config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    config = make_config(run.root, output_dir=str(tmp_path / "mine"), overwrite=True)
    assert "holds files that no export wrote" in refused(config)
    (tmp_path / "mine" / "export.json").write_text('{"format": "of another program"}')
    assert "is no file of this version's export" in refused(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("instances", 0), ("rank", 0), ("limit", 0), ("batch_size", 0), ("max_new_tokens", 0), ("tasks", [])],
)
def test_values_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^export\.{key}="):
        FitConfig(**{key: value})  # type: ignore[arg-type]


def test_fitted_and_compared_instances_never_overlap(make_run: MakeRun, make_config: MakeConfig) -> None:
    config = make_config(make_run().root, split="heldout", instances=100, limit=2)
    groups = choose_inputs(config)[:2]
    for task in TASKS:
        fitted, compared = ({r.index for r in group[task]} for group in groups)
        assert (len(fitted), len(compared)) == (3, 2)
        assert not fitted & compared
    whole, nothing, _ = choose_inputs(replace(config, export=replace(config.export, evaluate=False)))
    assert [len(records) for records in whole.values()] == [6, 6] and nothing == {}


def test_samples_are_seeded(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run().root
    chosen: Callable[[int], list[int]] = lambda seed: [  # noqa: E731
        r.index for r in choose_inputs(make_config(run, instances=3, seed=seed))[0][TASKS[0]]
    ]
    assert chosen(0) == chosen(0) and len(chosen(0)) == 3
    assert any(chosen(0) != chosen(seed) for seed in (1, 2, 3))


def test_folder_names_are_safe_and_distinct() -> None:
    names = folder_names(["a/b", "a b", "A_b", "..", "visual+question", "é"])
    assert names == {
        "a/b": "a_b",
        "a b": "a_b-2",
        "A_b": "A_b-3",
        "..": "task",
        "visual+question": "visual+question",
        "é": "é",
    }


def test_mean_over_tasks_by_hand() -> None:
    first = np.array([[2.0, 1.0], [4.0, 2.0]])
    second = np.array([[1.0, 1.0], [3.0, 1.0], [2.0, 1.0]])
    both = mean_over_tasks([first, second])
    # 6 / 3 and 6 / 3; the first task's ratio is the same however it is resampled.
    assert both.value == 2.0
    assert both.low is not None and both.high is not None
    assert 1.5 <= both.low < 2.0 < both.high <= 2.5
    unseen = wilson(0, 8).high or 0.0
    alike = mean_over_tasks([np.array([[0.0, 1.0]] * 8)])
    assert (alike.value, alike.low, alike.high) == (0.0, -unseen, unseen)
    certain = mean_over_tasks([np.array([[1.0, 1.0]] * 8)])
    assert (certain.value, certain.high) == (1.0, 1.0) and certain.low == pytest.approx(wilson(8, 8).low)
