"""From a local copy of Vision-Flan to a trained adapter, and to a checked one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mixlora_cli.config import (
    AdapterConfig,
    CheckConfig,
    CheckOptions,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
    TrainConfig,
)
from mixlora_cli.data.problems import Kind
from mixlora_cli.prepare.check import Remark, run_check
from mixlora_cli.prepare.vision_flan import prepare_vision_flan
from mixlora_cli.training.run_folder import read_metrics
from mixlora_cli.training.train import train

from .conftest import png, record, vision_flan_records

TINY = ModelConfig(name="tiny", source="tiny", train_also=["multi_modal_projector"])
OPTIM = OptimConfig(
    epochs=1, batch_size=1, learning_rate=1e-2, precision="fp32", log_every=1, cache_features=False,
    group_by_length=False,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "cached"), [(2, False), (0, True)])
def test_one_epoch_from_the_archive(make_copy, configure, tmp_path: Path, workers: int, cached: bool) -> None:
    """Every record alone in its batch, the one without a picture too; the projector is trained."""
    config = configure(make_copy())
    prepare_vision_flan(config)
    run = train(
        TrainConfig(
            model=TINY,
            adapter=AdapterConfig(name="mixlora"),
            routing=RoutingConfig(name="instance"),
            data=config.data,
            train=replace(OPTIM, workers=workers, cache_features=cached),
            rank=2,
            factors=4,
            output_dir=str(tmp_path / "run"),
        )
    )
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 14))
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert len(load_file(run / "adapter" / "adapter_model.safetensors")) > 0


def test_the_check_counts_exactly(make_copy, configure, tmp_path: Path) -> None:
    records = [
        *vision_flan_records(),
        vision_flan_records()[3],
        record("VQA", 5, "What?", "a", "half.png"),
        record("VQA", 6, "Which?", "red " * 300, "CIFAR+colour_1.png"),
    ]
    config = configure(make_copy(records, {"half.png": png("red", 64)[:60]}), data={"max_length": 400})
    prepare_vision_flan(config)
    heldout = tmp_path / "heldout.json"
    heldout.write_text(json.dumps([record("VQA", 0, "What is it?", "red", "same.png")]))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "same.png").write_bytes(png("red", 16))
    data = replace(config.data, heldout=str(heldout), images=str(tmp_path / "pictures"))
    report = run_check(CheckConfig(TINY, data, str(tmp_path / "out"), CheckOptions(workers=1)))
    training, _ = report.splits
    assert {sort: found.count for sort, found in training.found.items()} == {
        Kind.CORRUPT_IMAGE: 1,
        Remark.DUPLICATE: 1,
        Remark.OVER_LENGTH: 1,
        Remark.UNDEFINED_TASK: 2,
    }
    assert (training.records, training.good, training.text_only) == (16, 15, 1)
    assert training.shared_ids == 15 - 3  # three tasks, each with one id
    (leak,) = report.leaks
    assert leak.same_picture.examples == ["same.png = CIFAR+colour_0.png"]
    assert (leak.same_text.count, leak.same_picture_and_question.count) == (1, 1)
    assert report.exit_code == 1
