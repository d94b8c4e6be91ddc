"""Files and folders are complete or not there, whoever else writes them and whatever fails."""

from __future__ import annotations

import errno
import re
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mixlora_cli.errors import UserError
from mixlora_cli.store import (
    folder_beside,
    publish_folder,
    remove_temporary,
    rename_unless_there,
    temp_of,
    write_errors,
    write_text,
)


def make(root: Path, text: str) -> None:
    with folder_beside(root) as draft:
        (draft / "file").write_text(text)
        rename_unless_there(draft, root, Path.is_dir)


def test_the_first_one_stays_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    root = tmp_path / "cache" / "model"
    make(root, "first")
    make(root, "second")
    assert (root / "file").read_text() == "first"
    assert [path.name for path in root.parent.iterdir()] == ["model"]
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_what_stands_in_the_way_and_is_not_whole_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "model"
    root.write_text("a file")
    with pytest.raises(OSError):
        make(root, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def fill(folder: Path, text: str = "12345") -> Path:
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)
    return folder


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
        assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == text
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
