"""Folders that several processes make at once."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from mixlora_cli.store import folder_beside, rename_unless_there


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
