"""The cells of every table: which, in which order, where they lie, and what makes another cell of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.config import EvalConfig, ReproduceConfig, SpeedConfig, TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.reproduce import estimate
from mixlora_cli.reproduce import run as reproduction
from mixlora_cli.reproduce.cell import Cell
from mixlora_cli.reproduce.compose import composed
from mixlora_cli.reproduce.grid import build_grid
from mixlora_cli.reproduce.layout import LAYOUTS
from mixlora_cli.reproduce.runner import Outcome

REPLICATED = ["lora_r4", "lora_r16", "mixlora_e16_r4"]
UNSEEN = {"mini_mme": 160, "mini_vsr": 120}


@pytest.fixture(autouse=True)
def known_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in data need not be drawn to be counted."""
    monkeypatch.setattr(estimate, "_unseen_sizes", lambda: UNSEEN)


def grid(what: str, **more: Any) -> list[Cell]:
    settings = {"output_dir": "cells", "speed": SpeedConfig(2.0, 4.0), "replicated": REPLICATED, **more}
    return build_grid(ReproduceConfig(what=what, **settings))  # type: ignore[arg-type]


def test_table_1_runs_every_row_then_the_further_seeds() -> None:
    cells = grid("table1")
    rows = [row.experiment for row in LAYOUTS["table1"].rows]
    assert [(cell.experiment, cell.seed) for cell in cells] == [
        *((row, 0) for row in rows),
        *((row, seed) for seed in (1, 2) for row in ("lora_r4", "lora_r16", "mixlora_e16_r4")),
    ]
    assert len({cell.folder for cell in cells}) == len(cells) == 19
    base, *trained = cells
    assert [part.name for part in base.parts] == ["eval"]
    assert all([part.name for part in cell.parts] == ["train", "eval"] for cell in trained)


def test_only_some_rows() -> None:
    cells = grid("table1", only=["mixlora_e16_r4", "lora_r2"])
    assert [(cell.experiment, cell.seed) for cell in cells] == [
        ("lora_r2", 0), ("mixlora_e16_r4", 0), ("mixlora_e16_r4", 1), ("mixlora_e16_r4", 2)
    ]  # fmt: skip
    everything = {cell.folder for cell in grid("table1")}
    assert {cell.folder for cell in cells} < everything
    assert [cell.experiment for cell in grid("figures", only=["lora_r16"])] == ["lora_r16"]
    with pytest.raises(UserError, match="only=lora_r3: no such row; rows are llava_align, llava_ft"):
        grid("table1", only=["lora_r3"])


def test_the_share_of_a_cell_does_not_depend_on_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    class Stopped:
        def __init__(self, *arguments: Any) -> None:
            given.append(arguments[-1])

        def run(self, cells: list[Cell]) -> Outcome:
            return Outcome(stopped=True)

    monkeypatch.setattr(reproduction, "Runner", Stopped)
    for only in (["lora_r2"], ["lora_r2", "lora_r8", "lora_r32"]):
        config = ReproduceConfig(str(tmp_path), SpeedConfig(2.0, 4.0), "table1", only=only, seeds=[0], jobs=3)
        with pytest.raises(KeyboardInterrupt):
            reproduction.reproduce(config)
    assert given == [3, 3]


def test_every_command_composes_into_what_the_cell_asks() -> None:
    cell = next(cell for cell in grid("table1", seeds=[0]) if cell.experiment == "mixlora_e16_r4")
    train, evaluation = cell.parts
    command, *overrides = train.arguments
    config = composed(command, TrainConfig, overrides)
    assert (config.adapter.name, config.factors, config.rank, config.seed) == ("mixlora", 16, 4, 0)
    assert (config.output_dir, config.resume) == (str(cell.folder), "auto")
    assert cell.folder.name.startswith("mixlora_e16_r4-seed0-")
    command, *overrides = evaluation.arguments
    here = [text.replace(str(cell.folder), ".") if text.startswith("run=") else text for text in overrides]
    asked = composed(command, EvalConfig, here)
    assert (asked.output_dir, asked.data.name, asked.eval.batch_size) == (f"{cell.folder}/eval", "mini", 32)


def test_estimates() -> None:
    cell = grid("table2", seeds=[0])[0]
    train, evaluation = cell.parts
    steps = composed("train", TrainConfig, train.arguments[1:]).train
    assert steps.steps is not None
    assert train.seconds == steps.steps * steps.batch_size / 2.0
    assert evaluation.seconds == 280 / 4.0
    smoke = grid("table2", seeds=[0], budget=5)[0]
    assert [part.seconds for part in smoke.parts] == [5 * steps.batch_size / 2.0, 10 / 4.0]


def folder_of(**more: Any) -> Path:
    """Of a row; of the smallest table, because Hydra takes its time for every cell."""
    return next(
        cell for cell in grid("table2", seeds=[0], **more) if cell.experiment == "routing_random"
    ).folder


def test_what_changes_the_result_makes_another_cell_and_nothing_else_does() -> None:
    usual = folder_of()
    for override in ("train.learning_rate=3e-3", "data.max_per_task=9"):
        assert folder_of(train=[override]) != usual
    assert folder_of(train=["train.save_every=7", "train.log_every=3", "wandb.mode=offline"]) == usual
    assert folder_of(evaluation=["eval.limit=7"]) == usual  # evaluated anew, not trained anew
    assert folder_of(budget=3) == folder_of(train=["train.steps=3"])


def test_another_version_of_the_built_in_data_makes_another_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = folder_of()
    monkeypatch.setattr("mixlora_cli.reproduce.compose.generator_digest", lambda: "newer")
    assert folder_of() != usual


def asked_of_evaluation(**more: Any) -> Any:
    return grid("table2", seeds=[0], **more)[0].parts[1].asked


def test_what_changes_an_answer_asks_for_another_evaluation() -> None:
    usual = asked_of_evaluation()
    assert asked_of_evaluation(evaluation=["eval.limit=7"]) != usual
    assert asked_of_evaluation(evaluation=["eval.max_new_tokens=7"]) != usual
    assert asked_of_evaluation(evaluation=["eval.batch_size=7"]) == usual
    assert "output_dir" not in usual and "data.source" in usual


def test_an_overrides_own_output_dir_does_not_part_name_and_contents() -> None:
    cell = grid("table2", seeds=[0], train=["output_dir=other"])[0]
    assert composed("train", TrainConfig, cell.parts[0].arguments[1:]).output_dir == str(cell.folder)


def test_table_3_has_a_specialist_for_each_of_six_tasks() -> None:
    cells = grid("table3", seeds=[0])
    specialists = [cell for cell in cells if cell.task is not None]
    assert len(specialists) == 12 and len(cells) == 15
    assert len({cell.folder for cell in cells}) == 15
    first = specialists[0]
    assert f"data.tasks=[{first.task}]" in first.parts[0].arguments
    assert f"data.tasks=[{first.task}]" in first.parts[1].arguments
    joint = next(cell for cell in cells if cell.experiment == "lora_r4")
    assert joint.parts[1].name == "eval-seen"
    asked = composed("eval", EvalConfig, [*joint.parts[1].arguments[1:-2], "adapter=none"])
    assert asked.eval.benchmarks == [] and asked.eval.seen and len(asked.data.tasks or []) == 6
    assert joint.parts[1].seconds == 6 * 60 / 4.0


def test_tables_share_their_cells() -> None:
    by_table = {what: {cell.folder for cell in grid(what, seeds=[0])} for what in LAYOUTS}
    assert len(by_table["table1"] & by_table["table2"]) == 1
    assert len(by_table["table1"] & by_table["table3"]) == 3
    assert len(by_table["table1"] & by_table["figure4"]) == 6
    assert len(by_table["table1"] & by_table["beyond"]) == 2
    assert len(by_table["table3"] & by_table["control"]) == 12  # the specialists
    others = {cell.experiment for cell in grid("seen", seeds=[0]) if cell.folder not in by_table["beyond"]}
    assert by_table["beyond"] < by_table["seen"]  # the same trainings, scored on other instances
    assert others == {"lora_r4", "routing_random", "mixlora_e32_r4", "routing_task"}


@pytest.mark.parametrize("what", LAYOUTS)
def test_the_committed_results_are_of_todays_configurations(what: str) -> None:
    """Else they have to be made again, or the change is not what it seems."""
    kept = {path.name for path in (Path(__file__).parents[2] / "results" / "mini").iterdir()}
    assert {cell.folder.name for cell in grid(what, seeds=[0])} <= kept


def test_figures_need_three_trainings_and_draw_from_them() -> None:
    lora, large, mixlora = grid("figures")
    assert [cell.experiment for cell in (lora, large, mixlora)] == [
        "lora_r16",
        "mixlora_e32_r8",
        "mixlora_e16_r4",
    ]
    assert [part.name for part in large.parts] == ["train", "tsne", "tsne-pairs"]
    assert f"compare={lora.folder}/interference" in mixlora.parts[1].arguments
    assert lora.parts[1].arguments[:2] == ("interference", f"run={lora.folder}")
    assert [each.after for each in (lora, mixlora, large)] == [None, lora.folder, None]


@pytest.mark.parametrize(("what", "cells"), [("table1", 13), ("table2", 3), ("table3", 15), ("figure4", 12)])
def test_the_papers_grids_compose(what: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_planned", lambda arguments: 3600.0)
    built = grid(what, scale="paper")
    assert len(built) == cells and {cell.seed for cell in built} == {0}
    for cell in built:
        for part in cell.parts:
            assert f"experiment=paper/{cell.experiment}" in part.arguments or part.name != "train"


def test_mistakes_are_said_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"train\.stepz=3: unknown key"):
        grid("table2", train=["train.stepz=3"])
    with pytest.raises(UserError, match=r"replicated=lora_r5: no such row; rows are "):
        grid("table1", replicated=["lora_r5"])
    with pytest.raises(ValueError, match="jobs=0: must be > 0 or null"):
        grid("table1", jobs=0)
    with pytest.raises(ValueError, match="must name at least one seed"):
        grid("table1", seeds=[])
    for what in ("beyond", "seen", "control"):
        with pytest.raises(ValueError, match=f"`{what}` exists at scale=mini alone"):
            grid(what, scale="paper")
