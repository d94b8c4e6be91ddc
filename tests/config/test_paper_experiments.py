"""Every row of the paper's tables composes into the numbers that the paper gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from mixlora_cli.config import EvalConfig, OptimConfig, TrainConfig, load
from mixlora_cli.errors import UserError
from mixlora_cli.hydra_conf import register
from mixlora_cli.paths import conf_dir
from mixlora_cli.reproduce.paper import ROWS

LORA = {f"lora_r{rank}": rank for rank in (2, 4, 8, 16, 32)}
MIXLORA = {f"mixlora_e{factors}_r{rank}": (factors, rank) for factors in (16, 32) for rank in (2, 4, 8)}
ROUTINGS = ("instance", "random", "task")
SPECIALISTS = {f"specialist_lora_r{rank}": rank for rank in (4, 16)}
TRAINED = [
    *LORA,
    *MIXLORA,
    *(f"{name}_nocfs" for name in MIXLORA),
    *(f"routing_{name}" for name in ROUTINGS),
    "llava_ft",
]


def composed(config_class: type, root: str, *overrides: str) -> Any:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return load(config_class, compose(root, list(overrides)))


def trained(name: str, *overrides: str) -> TrainConfig:
    config = composed(TrainConfig, "train", f"experiment=paper/{name}", *overrides)
    assert isinstance(config, TrainConfig)
    return config


def test_there_is_a_file_for_each_row_and_no_other() -> None:
    names = {row.name for row in ROWS if not row.only_mini}
    assert names == {*TRAINED, *SPECIALISTS, "llava_align"}


@pytest.mark.parametrize("name", [*TRAINED, *SPECIALISTS])
def test_definitions_at_hand_change_no_row(name: str, tmp_path: Path) -> None:
    (tmp_path / "definitions.json").write_text("{}")
    overrides = ["data.tasks=[VQAv2]"] if name in SPECIALISTS else []
    defined = trained(name, f"data.metadata={tmp_path}/definitions.json", *overrides)
    assert defined.routing == trained(name, *overrides).routing
    assert defined.routing.name == (name.removeprefix("routing_") if "routing" in name else "instance")


@pytest.mark.parametrize("name", [*TRAINED, *SPECIALISTS])
def test_all_trainings_share_the_papers_recipe(name: str) -> None:
    config = trained(name, *(["data.tasks=[VQAv2]"] if name in SPECIALISTS else []))
    assert config.train == OptimConfig(
        epochs=3.0,
        steps=None,
        batch_size=8,
        accumulation=1,
        effective_batch=128,
        learning_rate=4e-5,
        scheduler="cosine",
        warmup_ratio=0.03,
        weight_decay=0.0,
        max_grad_norm=1.0,
        precision="bf16",
        gradient_checkpointing=True,
        group_by_length=False,
        cache_features=False,
        log_every=10,
        save_every=500,
        keep_checkpoints=2,
        workers=4,
    )
    assert (config.model.name, config.model.template) == ("llava_v1_7b", "v1")
    assert config.model.train_projector is False
    assert (config.data.name, config.data.max_length, config.data.max_per_task) == ("vision_flan", 1792, 1000)
    assert config.deepspeed.name == ("zero2" if name == "llava_ft" else "none")


@pytest.mark.parametrize(("name", "rank"), {**LORA, **SPECIALISTS}.items())
def test_lora_rows(name: str, rank: int) -> None:
    config = trained(name, *(["data.tasks=[VQAv2]"] if name in SPECIALISTS else []))
    assert (config.adapter.name, config.rank, config.adapter.dropout) == ("lora", rank, 0.05)
    assert config.adapter.alpha is None  # 2 * rank


@pytest.mark.parametrize(("name", "sizes"), MIXLORA.items())
def test_mixlora_rows_with_and_without_cfs(name: str, sizes: tuple[int, int]) -> None:
    with_cfs, without = trained(name), trained(f"{name}_nocfs")
    for config, cfs in ((with_cfs, "paper"), (without, "none")):
        assert (config.factors, config.rank) == sizes
        assert (config.adapter.name, config.adapter.cfs, config.adapter.router_grad) == (
            "mixlora",
            cfs,
            "none",
        )
        assert (config.adapter.alpha, config.adapter.dropout) == (None, 0.05)  # alpha = 2 * factors
        assert (config.routing.name, config.routing.pool) == ("instance", "all")
    factors, rank = sizes
    assert with_cfs.output_dir == f"runs/paper/mixlora-instance-e{factors}-r{rank}-seed0"
    assert without.output_dir == f"runs/paper/mixlora-instance-e{factors}-r{rank}-nocfs-seed0"


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_of_table_2(routing: str) -> None:
    config = trained(f"routing_{routing}")
    assert (config.routing.name, config.factors, config.rank) == (routing, 32, 4)
    assert config.output_dir == f"runs/paper/mixlora-{routing}-e32-r4-seed0"


def test_table_2s_instance_routing_is_table_1s_run() -> None:
    assert trained("routing_instance") == trained("mixlora_e32_r4")


def test_every_row_has_its_own_folder() -> None:
    folders = {name: trained(name).output_dir for name in TRAINED if name != "routing_instance"}
    assert len(set(folders.values())) == len(folders)


def test_full_fine_tuning_trains_no_adapter() -> None:
    assert trained("llava_ft").adapter.name == "full"


def test_a_specialist_needs_its_task() -> None:
    with pytest.raises(UserError, match=r"data\.tasks=\[\]: must name at least one task"):
        trained("specialist_lora_r4")
    one = trained("specialist_lora_r16", "data.tasks=[VQAv2]", "seed=3")
    assert one.data.tasks == ["VQAv2"]
    assert one.output_dir == "runs/paper/specialist-lora-r16-VQAv2-seed3"


def test_align_is_evaluated_and_never_trained() -> None:
    config = composed(EvalConfig, "eval", "experiment=paper/llava_align")
    assert (config.model.name, config.data.name, config.adapter.name) == (
        "llava_v1_7b",
        "vision_flan",
        "none",
    )
    assert config.output_dir == "runs/llava_v1_7b-base/eval"
    with pytest.raises(UserError, match=r"^eval: unknown key; .* mixlora eval"):
        trained("llava_align")


def test_evaluation_without_an_experiment_is_as_before() -> None:
    assert composed(EvalConfig, "eval", "adapter=none").model.name == "mini"


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECIALISTS)
def test_a_sweep_runs_the_six_tasks_of_table_3(name: str, tmp_path: Path) -> None:
    """Every job composes, has its own folder, and stops at the data that is not there."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mixlora_cli.cli",
            "train",
            "-m",
            f"experiment=paper/{name}",
            "data.root=nowhere",
        ],
        cwd=tmp_path,
        env={**os.environ, "MIXLORA_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    jobs = [line for line in done.stderr.splitlines() if line.startswith("error: job ")]
    assert len(jobs) == 6, done.stderr
    assert all("mixlora prepare model=llava_v1_7b" in line for line in jobs)
    for task in ("scienceqa", "coco", "fairface", "INATURALIST", "STVQA", "PACS"):
        assert sum(f"data.tasks=[{task}+" in line for line in jobs) == 1
