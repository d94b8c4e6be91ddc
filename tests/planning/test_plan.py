"""The paper's run as `mixlora plan` sees it, and the MFU it assumes against other published runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from analysis_fixtures import own_cache  # noqa: F401
from mixlora_cli.analysis.gpu_memory import GIB
from mixlora_cli.analysis.plan import Plan, make_plan
from mixlora_cli.analysis.plan_output import plan
from mixlora_cli.config import MachineConfig, PlanConfig, load
from mixlora_cli.errors import UserError
from mixlora_cli.hydra_conf import register
from mixlora_cli.models.skeleton import is_published
from mixlora_cli.paths import conf_dir

PAPER_HOURS = 20


def configured(*overrides: str) -> PlanConfig:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return load(PlanConfig, compose("plan", list(overrides)))


def planned(*overrides: str) -> Plan:
    return make_plan(configured(*overrides))


@pytest.fixture(scope="module")
def paper() -> Plan:
    return planned("experiment=paper/mixlora_e16_r4")


def test_parameters_of_the_papers_model(paper: Plan) -> None:
    counts = {kind: (count["trained"], count["frozen"]) for kind, count in paper.counts.items()}
    # 32 layers of four (4096, 4096), two (4096, 11008) and one (11008, 4096); E (d_in + d_out) for each.
    assert counts["factors"] == (32 * 16 * (4 * 8192 + 3 * 15104), 0)
    # 2 E d_in for the IFS routers and r d_in E for the CFS router; as published they are not trained.
    assert counts["routers"] == (0, 32 * (2 + 4) * 16 * (6 * 4096 + 11008))
    assert counts["projector"] == (0, 1024 * 4096 + 4096)
    assert counts["language model"][0] == counts["vision tower"][0] == 0


def test_the_papers_run_fits_on_four_gpus_of_80_gb(paper: Plan) -> None:
    assert (paper.config.plan.gpus, paper.config.plan.gpu) == (4, "a100-80gb")
    assert paper.own.fits
    assert paper.advice.startswith("deepspeed=none")
    assert 15 < paper.own.with_checkpointing.total / GIB < 40
    assert paper.own.without_checkpointing.total > paper.gpu.memory_bytes
    assert paper.own.largest_batch > 8


def test_the_papers_run_takes_its_4479_steps(paper: Plan) -> None:
    assert paper.work.instances == 191_105
    # 4479.02 rounded up, as the Trainer does.
    assert (paper.schedule.accumulation, paper.schedule.steps) == (4, 4480)


def test_hours_of_the_published_code_are_within_a_factor_of_one_and_a_half(paper: Plan) -> None:
    assert paper.published is not None
    assert PAPER_HOURS / 1.5 < paper.published.hours < PAPER_HOURS * 1.5
    assert paper.schedule.hours < 0.5 * paper.published.hours


@pytest.mark.parametrize(("size", "gpu", "hours"), [("7b", "a100-40gb", 10), ("13b", "a100-80gb", 20)])
def test_the_assumed_mfu_is_that_of_llavas_own_runs(size: str, gpu: str, hours: float) -> None:
    """LLaVA's README: all weights of LLaVA-1.5, 665 thousand instances, on 8 A100s, in about 10 and 20 hours."""
    made = planned(
        f"model=llava_1_5_{size}",
        "adapter=full",
        "train.gradient_checkpointing=true",
        "train.effective_batch=128",
        "train.cache_features=false",
        "plan.gpus=8",
        f"plan.gpu={gpu}",
        "plan.instances=665298",
        "plan.tokens=750",  # 576 of the picture and an estimate of the text
    )
    implied = made.config.plan.mfu * made.schedule.hours / hours
    assert implied == pytest.approx(MachineConfig().mfu, rel=0.15)


def test_disk_of_the_papers_run(paper: Plan) -> None:
    trained, routers = 39_976_960, 109_314_048
    assert paper.disk["base"] == 2 * (6_738_939_904 + 303_179_776 + 4_198_400)
    assert paper.disk["adapter"] == 4 * (trained + routers)
    assert paper.disk["checkpoints"] == 3 * (4 * (trained + routers) + 8 * trained)
    assert paper.disk["features"] == 0
    cached = planned("experiment=paper/lora_r4", "train.cache_features=true")
    assert cached.disk["features"] == 191_105 * 256 * 1024 * 2


def test_full_fine_tuning_needs_zero_and_is_told_so() -> None:
    made = planned("experiment=paper/llava_ft")
    fits = {stage: fit.fits for stage, fit in made.fits.items()}
    assert fits == {"none": False, "zero1": True, "zero2": True, "zero3": True, "zero3_offload": True}
    assert made.stage == "zero2"
    assert made.published is None


def test_a_batch_that_is_too_large_is_told_what_fits() -> None:
    made = planned(
        "experiment=paper/mixlora_e16_r4", "plan.gpu=rtx4090", "plan.gpus=1", "train.batch_size=16"
    )
    assert not made.own.fits
    best = {stage: fit.largest_batch for stage, fit in made.fits.items()}
    assert 1 <= best["none"] < 16
    bigger, exact = (
        make_plan(
            replace(made.config, train=replace(made.config.train, batch_size=size, effective_batch=None))
        )
        for size in (best["none"] + 1, best["none"])
    )
    assert exact.own.fits and not bigger.own.fits


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.batch_size=16", "data.max_length=1024"], "train.batch_size=1 train.accumulation=16"),
        (["train.batch_size=1", "data.max_length=8192"], "train.gradient_checkpointing=true"),
        (
            ["train.batch_size=2", "data.max_length=8192"],
            "train.batch_size=1 train.accumulation=2 train.gradient_checkpointing=true",
        ),
        (
            ["model=llava_1_5_13b", "train.batch_size=2", "train.gradient_checkpointing=true"],
            "model.quantization=nf4",
        ),
        (
            ["model=llava_1_5_13b", "train.batch_size=1"],
            "train.gradient_checkpointing=true model.quantization=nf4",
        ),
    ],
)
def test_one_card_of_24_gb_takes_the_first_way_that_fits(overrides: list[str], expected: str) -> None:
    """A smaller batch before checkpointing, both before four bits, and as many instances a step as before."""
    usual = ["train.gradient_checkpointing=false", "train.accumulation=1", "data.max_length=1792"]
    made = planned("model=llava_1_5_7b", "adapter=lora", *usual, *overrides)
    need, way = made.small_card
    assert need.total > 24 * GIB
    assert way is not None and made.need(way, "none", 1).total <= 24 * GIB
    assert way.overrides(made.way, made.config.train.accumulation) == expected


@pytest.mark.parametrize(
    ("preset", "tokens", "parts"),
    [
        ("qwen2_5_vl_7b", 391, {"vision tower", "language model"}),  # 34 x 46 patches, four in a token
        ("smolvlm2_500m", 13 * 64, {"vision tower", "projector", "language model"}),  # 12 tiles and the whole
        ("gemma3_4b", 256, {"vision tower", "projector", "language model"}),
        ("smollm2_135m", 0, {"language model"}),
    ],
)
def test_presets_are_planned_without_a_network(preset: str, tokens: int, parts: set[str]) -> None:
    made = planned(f"model={preset}", "adapter=lora", "plan.instances=1000", "train.packing=true")
    assert made.counts.keys() == {"factors", *parts}
    assert made.work.tokens == tokens + 144 and made.work.padding == 0
    assert (made.schedule.vision > 0) == (tokens > 0) and made.small_card[1] is not None


def test_every_preset_has_published_sizes() -> None:
    for file in (conf_dir() / "model").glob("*.yaml"):
        model = configured(
            f"model={file.stem}", "model.name_or_path=x" if file.stem == "hf" else "seed=0"
        ).model
        assert file.stem == "hf" or model.source not in ("hub", "prepared") or is_published(model), file.stem


def test_no_way_fits_where_the_base_is_trained() -> None:
    made = planned("experiment=paper/llava_ft")
    assert made.small_card[1] is None and made.quantizations == ("none",)


def test_a_small_training_fits_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured("model=mini", "train.gradient_checkpointing=true", f"output_dir={tmp_path}/run")
    written = json.loads(plan(config).read_text())
    assert written["one_24gb_card"]["fits"] is True
    size = written["one_24gb_card"]["bytes"] / GIB
    assert f"fits one 24 GB card: yes ({size:.1f} of 24 GiB)" in capsys.readouterr().out


def test_an_impossible_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot be split over 3 processes"):
        planned("experiment=paper/lora_r4", "plan.gpus=3")


def test_specialists_see_one_task() -> None:
    made = planned("experiment=paper/specialist_lora_r4", "data.tasks=[VQAv2]")
    assert (made.work.instances, made.schedule.steps) == (1000, 24)


def test_own_files_are_counted(tmp_path: Path) -> None:
    rows = [{"id": str(n), "task_name": f"task{n % 3}", "conversations": []} for n in range(10)]
    (tmp_path / "my.json").write_text(json.dumps(rows))
    own = [f"data.train={tmp_path}/my.json", f"data.images={tmp_path}"]
    assert planned("model=tiny", "data=json", *own).work.instances == 10
    assert planned("model=tiny", "data=json", *own, "data.tasks=[task0]").work.instances == 4
    assert planned("model=tiny", "data=json", *own, "data.max_per_task=2").work.instances == 6


def test_the_plan_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured("experiment=paper/mixlora_e16_r4", f"output_dir={tmp_path}/run")
    written = json.loads(plan(config).read_text())
    assert written["fits"] is True and written["stage"] == "none"
    assert set(written["memory"]) == {"none", "zero1", "zero2", "zero3", "zero3_offload"}
    assert written["workload"]["assumed"] == ["label tokens", "tokens of an instance", "padding", "mfu"]
    told = capsys.readouterr().out
    assert "fits on 4 x A100 80 GB" in told
    assert f"{written['time_published_code']['hours']:.1f}" in told
    assert max(map(len, told.split("operations and time")[0].splitlines()[2:-2])) <= 80


def test_fsdp_is_not_counted() -> None:
    with pytest.raises(UserError, match=r"^train\.fsdp=true: not counted; deepspeed=zero3 spreads as much"):
        configured("train.fsdp=true", "launch.nproc=2")
