"""A checkpoint counts when every file of it is there in full; what was there before goes only after that."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mixlora_cli.errors import UserError
from mixlora_cli.store import publish_folder, remove_temporary, temp_of, write_errors, write_text
from mixlora_cli.training.run_folder import SEAL, RunFolder, drafts_of, flaw, newest_complete, publish, seal
from mixlora_cli.training.train import train

from .conftest import MakeConfig


def fill(folder: Path, text: str = "12345") -> Path:
    (folder / "global_step").mkdir(parents=True)
    (folder / "global_step" / "shard.pt").write_text(text)
    (folder / "optimizer.pt").write_text(text)
    return folder


def checkpoint(root: Path, step: int) -> Path:
    folder = fill(root / f"checkpoint-{step}")
    seal(folder)
    return folder


def test_each_kind_of_damage_is_named(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 1)
    assert flaw(whole) is None
    (whole / "optimizer.pt").write_text("123")
    assert flaw(whole) == "optimizer.pt has 3 of 5 bytes"
    (whole / "optimizer.pt").write_text("12345")
    (whole / "global_step" / "shard.pt").unlink()
    assert flaw(whole) == "global_step/shard.pt is missing"
    (whole / SEAL).write_text('{"optimizer.pt": ')
    assert flaw(whole) == f"it has no readable {SEAL}, which is written last"
    assert flaw(tmp_path / "nowhere") == flaw(whole)


def test_the_newest_complete_one_is_found_and_newer_torn_ones_are_named(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "nowhere") == (None, {})
    for step in (9, 10, 100, 200):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-9" / SEAL).unlink()
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
    draft = fill(drafts_of(tmp_path) / "checkpoint-4")
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-2"
    assert publish(draft, tmp_path, keep=2) == tmp_path / "checkpoint-4"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-4"


def test_a_new_one_takes_the_place_of_a_torn_one_of_the_same_step(tmp_path: Path) -> None:
    (checkpoint(tmp_path, 4) / "optimizer.pt").unlink()
    publish(fill(drafts_of(tmp_path) / "checkpoint-4", "new"), tmp_path, keep=1)
    (only,) = tmp_path.iterdir()
    assert (only / "optimizer.pt").read_text() == "new"
    assert flaw(only) is None


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path: Path) -> None:
    fill(temp_of(tmp_path / "adapter"))
    fill(tmp_path / "adapter.replaced")
    temp_of(tmp_path / "result.json").touch()
    (tmp_path / "notes.txt").touch()
    remove_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_whole_files_and_folders_replace_what_was_there(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / "file", text)
        publish_folder(fill(tmp_path / "draft", text), tmp_path / "folder")
        assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "optimizer.pt").read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "No space left on device (os error 28)",
        ),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "a file came out incomplete"),
    ],
)
def test_a_full_disk_is_said_in_a_line(tmp_path: Path, error: Exception, reason: str) -> None:
    pattern = rf"^{re.escape(str(tmp_path))}: cannot be written: {re.escape(reason)} \([\d,]+ MB free there\); go on$"
    with pytest.raises(UserError, match=pattern), write_errors(tmp_path, lambda: "go on"):
        raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "no"), RuntimeError("a bug"), ValueError("x")]
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), write_errors(tmp_path, lambda: "go on"):
        raise error


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
