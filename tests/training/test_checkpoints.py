"""A checkpoint counts when every file of it is there in full; what was there before goes only after that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mixlora_cli.errors import UserError
from mixlora_cli.training.run_folder import (
    MANIFEST,
    RunFolder,
    missing_from,
    newest_complete,
    publish_checkpoint,
    temp_checkpoints,
    write_manifest,
)
from mixlora_cli.training.train import train

from .conftest import MakeConfig


def fill(folder: Path, text: str = "12345") -> Path:
    (folder / "global_step").mkdir(parents=True)
    (folder / "global_step" / "shard.pt").write_text(text)
    (folder / "optimizer.pt").write_text(text)
    return folder


def checkpoint(root: Path, step: int) -> Path:
    folder = fill(root / f"checkpoint-{step}")
    write_manifest(folder)
    return folder


def test_each_kind_of_damage_is_named(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 1)
    assert missing_from(whole) is None
    (whole / "optimizer.pt").write_text("123")
    assert missing_from(whole) == "optimizer.pt has 3 of 5 bytes"
    (whole / "optimizer.pt").write_text("12345")
    (whole / "global_step" / "shard.pt").unlink()
    assert missing_from(whole) == "global_step/shard.pt is missing"
    (whole / MANIFEST).write_text('{"optimizer.pt": ')
    assert missing_from(whole) == f"it has no readable {MANIFEST}, which is written last"
    assert missing_from(tmp_path / "nowhere") == missing_from(whole)


def test_the_newest_complete_one_is_found_and_newer_torn_ones_are_named(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "nowhere") == (None, {})
    for step in (9, 10, 100, 200):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-9" / MANIFEST).unlink()
    for step in (100, 200):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
    newest, torn = newest_complete(tmp_path)
    assert newest == tmp_path / "checkpoint-10"
    assert list(torn) == [tmp_path / "checkpoint-200", tmp_path / "checkpoint-100"]
    assert set(torn.values()) == {"optimizer.pt is missing"}


def test_older_and_torn_ones_go_when_a_new_one_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    draft = fill(temp_checkpoints(tmp_path) / "checkpoint-4")
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-2"
    assert publish_checkpoint(draft, tmp_path, keep=2) == tmp_path / "checkpoint-4"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-4"


def test_a_new_one_takes_the_place_of_a_torn_one_of_the_same_step(tmp_path: Path) -> None:
    (checkpoint(tmp_path, 4) / "optimizer.pt").unlink()
    publish_checkpoint(fill(temp_checkpoints(tmp_path) / "checkpoint-4", "new"), tmp_path, keep=1)
    (only,) = tmp_path.iterdir()
    assert (only / "optimizer.pt").read_text() == "new"
    assert missing_from(only) is None


def test_a_torn_checkpoint_is_passed_over_with_a_word(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("run", "lora", steps=2, save_every=1)
    run = RunFolder(train(config))
    expected = (run.adapter / "adapter_model.safetensors").read_bytes()
    run.result.write_text('{"steps": ')  # torn, too
    assert not run.finished
    torn = run.checkpoints / "checkpoint-2" / "optimizer.pt"
    size = torn.stat().st_size
    torn.write_bytes(torn.read_bytes()[:10])
    capsys.readouterr()

    train(replace(config, resume="auto"))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        f"checkpoint-2 is not complete, so it is passed over: optimizer.pt has 10 of {size} bytes"
    )
    assert said[1] == f"resuming from {run.checkpoints / 'checkpoint-1'}"
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == expected
    assert run.finished
    assert torn.stat().st_size == size
    with pytest.raises(
        UserError, match=r"resume=.*: no complete checkpoint there: it has no readable complete"
    ):
        train(replace(config, overwrite=True, output_dir=config.output_dir + "2", resume=str(run.root)))
