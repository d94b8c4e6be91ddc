"""The cells of every table: which, in which order, where they lie, and what makes another cell of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.config import EvalConfig, ReproduceConfig, SpeedConfig, TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.hydra_app import composed
from mixlora_cli.reproduce import grid as reproduction
from mixlora_cli.reproduce import jobs
from mixlora_cli.reproduce.jobs import Job, build_grid
from mixlora_cli.reproduce.paper import TABLES, rows_of
from mixlora_cli.reproduce.runner import Outcome

REPLICATED = ["lora_r4", "lora_r16", "mixlora_e16_r4"]
UNSEEN = {"mini_mme": 160, "mini_vsr": 120}
SPEED = SpeedConfig(train=2.0, answer=4.0)


@pytest.fixture(autouse=True)
def known_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in data need not be drawn to be counted."""
    monkeypatch.setattr(jobs, "_unseen_sizes", lambda: UNSEEN)


def grid(what: str, **more: Any) -> list[Job]:
    settings = {"output_dir": "cells", "speed": SPEED, "replicated": REPLICATED, **more}
    return build_grid(ReproduceConfig(what=what, **settings))  # type: ignore[arg-type]


def names(cells: list[Job]) -> list[tuple[str, int]]:
    return [(cell.experiment, cell.seed) for cell in cells]


def test_table_1_runs_every_row_then_the_further_seeds() -> None:
    cells = grid("table1")
    further = [(row, seed) for seed in (1, 2) for row in REPLICATED]
    assert names(cells) == [*((row.name, 0) for row in rows_of("table1")), *further]
    assert len({cell.folder for cell in cells}) == len(cells) == 19
    base, *trained = cells
    assert [step.name for step in base.steps] == ["eval"]
    assert all([step.name for step in cell.steps] == ["train", "eval"] for cell in trained)
    some = grid("table1", only=["mixlora_e16_r4", "lora_r2"])
    assert names(some) == [("lora_r2", 0), *(("mixlora_e16_r4", seed) for seed in range(3))]
    assert {cell.folder for cell in some} < {cell.folder for cell in cells}


def test_the_share_of_a_cell_does_not_depend_on_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    class Stopped:
        def __init__(self, *arguments: Any) -> None:
            given.append(arguments[-1])

        def run(self, cells: list[Job]) -> Outcome:
            return Outcome(stopped=True)

    monkeypatch.setattr(reproduction, "Runner", Stopped)
    for only in (["lora_r2"], ["lora_r2", "lora_r8", "lora_r32"]):
        settings: Any = {"what": "table1", "only": only, "seeds": [0], "jobs": 3}
        with pytest.raises(KeyboardInterrupt):
            reproduction.reproduce(ReproduceConfig(output_dir=str(tmp_path), speed=SPEED, **settings))
    assert given == [3, 3]


def test_every_command_composes_into_what_the_cell_asks() -> None:
    cell = next(cell for cell in grid("table1", seeds=[0]) if cell.experiment == "mixlora_e16_r4")
    train, evaluation = cell.steps
    command, *overrides = train.arguments
    config = composed(command, TrainConfig, overrides)
    assert (config.adapter.name, config.factors, config.rank, config.seed) == ("mixlora", 16, 4, 0)
    assert (config.output_dir, config.resume) == (str(cell.folder), "auto")
    assert cell.folder.name.startswith("mixlora_e16_r4-seed0-")
    command, *overrides = evaluation.arguments
    here = [text.replace(str(cell.folder), ".") if text.startswith("run=") else text for text in overrides]
    asked = composed(command, EvalConfig, here)
    assert (asked.output_dir, asked.data.name, asked.eval.batch_size) == (f"{cell.folder}/eval", "mini", 32)
    later = [key for key in evaluation.asked if key.startswith(("eval.server", "eval.requests"))]
    assert later == []  # cells that were evaluated before there were such keys stay good


def random_routing(**more: Any) -> Job:
    """A cell of the smallest table, because Hydra takes its time for every cell."""
    return grid("table2", seeds=[0], only=["routing_random"], **more)[0]


def test_estimates() -> None:
    train, evaluation = random_routing().steps
    steps = composed("train", TrainConfig, train.arguments[1:]).train
    assert steps.steps is not None
    assert train.seconds == steps.steps * steps.batch_size / 2.0
    assert evaluation.seconds == 280 / 4.0
    smoke = random_routing(budget=5)
    assert [step.seconds for step in smoke.steps] == [5 * steps.batch_size / 2.0, 10 / 4.0]


@pytest.mark.parametrize(
    ("given", "is_another"),
    [
        ({"train": ["train.learning_rate=3e-3"]}, True),
        ({"train": ["data.max_per_task=9"]}, True),
        ({"train": ["train.save_every=7", "train.log_every=3", "wandb.mode=offline"]}, False),
        ({"evaluation": ["eval.limit=7"]}, False),  # evaluated anew, not trained anew
    ],
)
def test_what_changes_the_training_makes_another_cell(given: dict[str, Any], is_another: bool) -> None:
    assert (random_routing(**given).folder != random_routing().folder) == is_another


def test_versions_and_budgets_are_in_the_folders_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert random_routing(budget=3).folder == random_routing(train=["train.steps=3"]).folder
    own = random_routing(train=["output_dir=other"])  # name and contents are not parted
    assert composed("train", TrainConfig, own.steps[0].arguments[1:]).output_dir == str(own.folder)
    usual = random_routing().folder
    monkeypatch.setattr(jobs, "generator_digest", lambda split: "newer")
    assert random_routing().folder != usual


def test_other_benchmarks_are_evaluated_anew_and_train_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def cells() -> tuple[Job, Job, Job, Job]:
        drawn = grid("figures", only=["lora_r16", "mixlora_e32_r8"])
        return random_routing(), grid("seen", seeds=[0], only=["routing_random"])[0], drawn[0], drawn[1]

    before, on_seen_before, *drawn_before = cells()
    digest = jobs.generator_digest
    monkeypatch.setattr(
        jobs, "generator_digest", lambda split: "newer" if split == "unseen" else digest(split)
    )
    after, on_seen_after, interference, maps = cells()
    assert after.folder == before.folder and after.steps[0].asked == before.steps[0].asked
    assert after.steps[1].asked == {**before.steps[1].asked, "data version": "newer"}
    assert on_seen_after.steps[1].asked == on_seen_before.steps[1].asked
    assert interference == drawn_before[0]
    assert [step.asked["data version"] for step in maps.steps[1:]] == ["newer", "newer"]
    assert [step.arguments for step in maps.steps] == [step.arguments for step in drawn_before[1].steps]


@pytest.mark.parametrize(
    ("override", "is_another"),
    [("eval.limit=7", True), ("eval.max_new_tokens=7", True), ("eval.batch_size=7", False)],
)
def test_what_changes_an_answer_asks_for_another_evaluation(override: str, is_another: bool) -> None:
    usual = random_routing().steps[1].asked
    assert (random_routing(evaluation=[override]).steps[1].asked != usual) == is_another
    assert "output_dir" not in usual and "data.source" in usual


def test_table_3_has_a_specialist_for_each_of_six_tasks() -> None:
    cells = grid("table3", seeds=[0])
    specialists = [cell for cell in cells if cell.task is not None]
    assert len(specialists) == 12 and len({cell.folder for cell in cells}) == len(cells) == 15
    first = specialists[0]
    assert all(f"data.tasks=[{first.task}]" in step.arguments for step in first.steps)
    joint = next(cell for cell in cells if cell.experiment == "lora_r4").steps[1]
    assert joint.name == "eval-seen" and joint.seconds == 6 * 60 / 4.0
    asked = composed("eval", EvalConfig, [*joint.arguments[1:-2], "adapter=none"])
    assert asked.eval.benchmarks == [] and asked.eval.seen and len(asked.data.tasks or []) == 6


def test_tables_share_their_cells_and_the_committed_ones_are_of_todays_configurations() -> None:
    """Else the latter have to be made again, or the change is not what it seems."""
    by_table = {what: {cell.folder for cell in grid(what, seeds=[0])} for what in TABLES}
    shared = {
        ("table1", "table2"): 1,
        ("table1", "table3"): 3,
        ("table1", "figure4"): 6,
        ("table1", "beyond"): 2,
    }
    assert {pair: len(by_table[pair[0]] & by_table[pair[1]]) for pair in shared} == shared
    assert len(by_table["table3"] & by_table["control"]) == 12  # the specialists
    assert by_table["beyond"] < by_table["seen"]  # the same trainings, scored on other instances
    others = {folder.name.partition("-")[0] for folder in by_table["seen"] - by_table["beyond"]}
    assert others == {"lora_r4", "routing_random", "mixlora_e32_r4", "routing_task"}
    kept = {path.name for path in (Path(__file__).parents[2] / "results" / "mini").iterdir()}
    assert {folder.name for folders in by_table.values() for folder in folders} <= kept


def test_figures_need_three_trainings_and_draw_from_them() -> None:
    lora, large, mixlora = grid("figures")
    assert names([lora, large, mixlora]) == [("lora_r16", 0), ("mixlora_e32_r8", 0), ("mixlora_e16_r4", 0)]
    assert [step.name for step in large.steps] == ["train", "tsne", "tsne-pairs"]
    assert f"compare={lora.folder}/interference" in mixlora.steps[1].arguments
    assert lora.steps[1].arguments[:2] == ("interference", f"run={lora.folder}")
    assert [each.after for each in (lora, mixlora, large)] == [None, lora.folder, None]
    assert names(grid("figures", only=["lora_r16"])) == [("lora_r16", 0)]


@pytest.mark.parametrize(("what", "count"), [("table1", 13), ("table2", 3), ("table3", 15), ("figure4", 12)])
def test_the_papers_grids_compose(what: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_planned", lambda arguments: 3600.0)
    built = grid(what, scale="paper")
    assert len(built) == count and {cell.seed for cell in built} == {0}
    trainings = [(cell, step) for cell in built for step in cell.steps if step.name == "train"]
    assert all(f"experiment=paper/{cell.experiment}" in step.arguments for cell, step in trainings)


@pytest.mark.parametrize(
    ("what", "given", "error", "message"),
    [
        ("table2", {"train": ["train.stepz=3"]}, UserError, r"train\.stepz=3: unknown key"),
        ("table1", {"replicated": ["lora_r5"]}, UserError, "replicated=lora_r5: no such row; rows are "),
        ("table1", {"only": ["lora_r3"]}, UserError, "only=lora_r3: .*rows are llava_align, llava_ft"),
        ("table1", {"jobs": 0}, ValueError, "jobs=0: must be > 0 or null"),
        ("table1", {"seeds": []}, ValueError, "must name at least one seed"),
        ("beyond", {"scale": "paper"}, ValueError, "`beyond` exists at scale=mini alone"),
        ("seen", {"scale": "paper"}, ValueError, "`seen` exists at scale=mini alone"),
        ("control", {"scale": "paper"}, ValueError, "`control` exists at scale=mini alone"),
        ("study", {"scale": "paper"}, ValueError, "`study` exists at scale=mini alone"),
        ("study_unseen", {"scale": "paper"}, ValueError, "`study_unseen` exists at scale=mini alone"),
    ],
)
def test_mistakes_are_said_before_anything_runs(
    what: str, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        grid(what, **given)
