"""The mini twins of the paper's rows: the same rows, one recipe, sizes that match where they are said to."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from mixlora_cli.analysis.plan import count_parameters, total
from mixlora_cli.config import EvalConfig, TrainConfig, load
from mixlora_cli.hydra_conf import register
from mixlora_cli.models.skeleton import attach_to_skeleton, build_skeleton
from mixlora_cli.paths import conf_dir
from mixlora_cli.reproduce.compose import sweep_of
from mixlora_cli.reproduce.paper import ROWS

ROOT = Path(__file__).parents[2]
CHANGED = {"straight_through", "pool_prompt", "cfs_released"}
TASK_ROUTING = {"task_routing", "control_task_routing"}
CONTROL = {"control_lora_r4", "control_lora_r16", "control_mixlora_e16_r4", "control_task_routing"}
BEYOND = {*CHANGED, *CONTROL, *TASK_ROUTING, "lora_equal"}
SPECIALISTS = {"specialist_lora_r4", "specialist_lora_r16"}
# What may differ between trainings that are compared; all else is the recipe's.
OWN = {"llava_ft": {"learning_rate"}, **{name: {"steps"} for name in SPECIALISTS | CONTROL}}
SEARCHED = "learning_rate"
"""Each row's own, from one search (docs/findings.md)."""
EQUAL = 0.01
"""Of two losses: what is nearer than a hundredth is not told apart there."""
TRAINED = sorted(row.name for row in ROWS if row.name != "llava_align")


@cache
def trained(name: str) -> TrainConfig:
    task = ["data.tasks=[count_digit]"] if name in SPECIALISTS else []
    config = composed(TrainConfig, "train", f"experiment=mini/{name}", *task)
    assert isinstance(config, TrainConfig)
    return config


def searched(config: TrainConfig) -> dict[float, float]:
    """The loss at each rate that was tried for these ranks and factors, as docs/findings.md takes it."""
    name = f"lora_r{config.rank}" if config.rank != 63 else "lora_equal"
    if config.adapter.name == "mixlora":
        name = f"mixlora_e{config.factors}_r{config.rank}"
    mean_loss = run_path(str(ROOT / "scripts" / "mean_loss.py"))["mean_loss"]
    files = (ROOT / "results" / "mini" / "search").glob(f"{name}-lr*.jsonl")
    return {float(file.stem.partition("-lr")[2]): mean_loss(file, 241, 300)[0] for file in files}


def composed(config_class: type, root: str, *overrides: str) -> Any:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return load(config_class, compose(root, list(overrides)))


def test_the_rows_are_the_papers_and_those_beyond_it() -> None:
    assert {row.name for row in ROWS if row.only_mini} == BEYOND


@pytest.mark.parametrize("name", TRAINED)
def test_lora_and_mixlora_share_one_recipe(name: str) -> None:
    method = trained(name).adapter.name
    ours, recipe = vars(trained(name).train), vars(trained("lora_r4").train)
    assert {key for key in recipe if ours[key] != recipe[key]} <= OWN.get(name, set()) | {SEARCHED}
    if method != "full":
        losses = searched(trained(name))
        assert len(losses) >= 2
        assert losses[ours[SEARCHED]] <= min(losses.values()) + EQUAL
    assert (trained(name).model.name, trained(name).data.name) == ("mini", "mini")


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in BEYOND | SPECIALISTS])
def test_each_row_is_the_papers_but_for_model_data_and_recipe(name: str) -> None:
    paper = composed(TrainConfig, "train", f"experiment=paper/{name}")
    mini = trained(name)
    assert (
        mini.adapter.name,
        mini.adapter.cfs,
        mini.adapter.router_grad,
        mini.routing.name,
        mini.routing.pool,
    ) == (
        *(
            paper.adapter.name,
            paper.adapter.cfs,
            paper.adapter.router_grad,
            paper.routing.name,
            paper.routing.pool,
        ),
    )
    if mini.adapter.name != "full":
        assert (mini.rank, mini.factors) == (paper.rank, paper.factors)


def test_beyond_the_paper_each_changes_one_choice() -> None:
    plain = trained("mixlora_e16_r4")
    changed = {name: trained(name) for name in CHANGED}
    for name, group, key, value in (
        ("straight_through", "adapter", "router_grad", "straight_through"),
        ("cfs_released", "adapter", "cfs", "released"),
        ("pool_prompt", "routing", "pool", "prompt"),
    ):
        for part in ("adapter", "routing", "train", "data", "model"):
            ours, theirs = vars(getattr(changed[name], part)), vars(getattr(plain, part))
            assert {k for k in ours if ours[k] != theirs[k]} == ({key} if part == group else set())
        assert getattr(getattr(changed[name], group), key) == value


def test_the_control_sees_what_the_specialists_see() -> None:
    tasks = sweep_of("train", TrainConfig, ["experiment=mini/specialist_lora_r4"], "data.tasks")
    specialist = trained("specialist_lora_r4")
    for name in CONTROL:
        control = trained(name)
        assert [f"[{task}]" for task in control.data.tasks or []] == tasks
        assert control.data.max_per_task == specialist.data.max_per_task
        assert control.train.steps == len(tasks) * (specialist.train.steps or 0)


def test_task_routing_changes_the_routing_alone() -> None:
    for name, usual in (
        ("task_routing", "mixlora_e16_r4"),
        ("control_task_routing", "control_mixlora_e16_r4"),
    ):
        ours, theirs = trained(name), trained(usual)
        assert (ours.routing.name, theirs.routing.name) == ("task", "instance")
        for part in ("adapter", "train", "data", "model", "rank", "factors"):
            assert getattr(ours, part) == getattr(theirs, part)


def test_every_row_has_its_own_folder() -> None:
    folders = {name: trained(name).output_dir for name in TRAINED if name != "routing_instance"}
    assert len(set(folders.values())) == len(folders)


def test_base_and_evaluation() -> None:
    base = composed(EvalConfig, "eval", "experiment=mini/llava_align")
    run = composed(EvalConfig, "eval", "experiment=mini/shared/evaluation", "run=.")
    assert (base.model.name, base.data.name, base.adapter.name) == ("mini", "mini", "none")
    assert base.eval == run.eval and base.data == run.data


def num_parameters(name: str) -> tuple[int, int]:
    """(trained, all) parameters that an experiment adds."""
    config = trained(name)
    adapted = attach_to_skeleton(
        build_skeleton(config.model), config.adapter, config.routing, config.rank, config.factors
    )
    counts = count_parameters(adapted)
    added = sum(sum(counts[kind].values()) for kind in ("factors", "routers") if kind in counts)
    return total(counts)[0], added


def test_lora_of_equal_size() -> None:
    """Routers keep their initial values: LoRA r=16 trains as much as E=16, r=4. Routers counted, r=63 comes nearest."""
    assert num_parameters("mixlora_e16_r4") == (4_884_480, 19_261_440)
    assert num_parameters("lora_r16") == (4_884_480, 4_884_480)
    assert num_parameters("straight_through")[0] == 19_261_440
    equal = num_parameters("lora_equal")[0]
    one_rank = equal // trained("lora_equal").rank
    assert equal == 19_232_640 and abs(equal - 19_261_440) < one_rank / 2
