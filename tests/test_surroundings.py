"""Terminals without some characters, users without a name or a home, systems whose names are ASCII."""

from __future__ import annotations

import getpass
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mixlora_cli.config.schema import DataConfig
from mixlora_cli.surroundings import settle_in
from tiny_runs import finished_run


def test_a_user_that_the_system_does_not_know_gets_what_libraries_ask_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    settle_in()
    try:
        assert (Path.home(), getpass.getuser()) == (Path("/"), f"uid{os.getuid()}")
    finally:
        for name in ("HOME", "USER"):
            os.environ.pop(name, None)


def test_a_known_user_keeps_name_and_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("USER", raising=False)
    settle_in()
    assert "HOME" not in os.environ
    assert "USER" not in os.environ


def record(name: str, task: str = "naming") -> dict[str, object]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    return {"id": name, "task_name": task, "image": name, "conversations": turns}


def mixlora(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, under these environment variables."""
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("LC_ALL", "LANG", "PYTHONUTF8")},
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MIXLORA_CACHE": str(tmp_path / "cache"),
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-m", "mixlora_cli.cli", *arguments],
        capture_output=True,
        env=environment,
        check=False,
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("0.png", "猫.png"):
        Image.new("RGB", (20, 20), (200, 30, 90)).save(folder / name)
    return folder


def check(
    tmp_path: Path, pictures: Path, names: list[str], **variables: str
) -> subprocess.CompletedProcess[bytes]:
    file = tmp_path / "train.json"
    file.write_text(json.dumps([record(name) for name in names]), encoding="utf-8")
    data = ("model=tiny", "data=json", f"data.train={file}", f"data.images={pictures}")
    return mixlora(tmp_path, "check", *data, f"output_dir={tmp_path / 'check'}", **variables)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_terminal_lacks_are_replaced(
    tmp_path: Path, pictures: Path, encoding: str
) -> None:
    done = check(tmp_path, pictures, ["猫.png", "犬.png"], PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (1, b"")  # the picture that is not there
    assert b"?.png" in done.stdout
    report = json.loads((tmp_path / "check" / "check.json").read_text(encoding="utf-8"))
    assert "犬.png" in json.dumps(report, ensure_ascii=False)


@pytest.mark.slow
def test_a_file_name_that_the_system_cannot_say_is_one_line(tmp_path: Path, pictures: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = check(tmp_path, pictures, ["猫.png"], **ascii_only)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert line.startswith("error: '") and line.endswith("ascii; set LC_ALL=C.UTF-8 or PYTHONUTF8=1")


@pytest.mark.slow
def test_reports_are_utf8_whatever_the_terminal_is(tmp_path: Path, pictures: Path) -> None:
    file = tmp_path / "unseen.json"
    file.write_text(json.dumps([record("0.png", "tâche")]), encoding="utf-8")
    run = finished_run(tmp_path / "run", DataConfig(name="json", source="json", unseen=str(file)))
    data = ("data=json", f"data.unseen={file}", f"data.images={pictures}", "eval.max_new_tokens=2")
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = mixlora(tmp_path, "eval", f"run={run.root}", *data, **ascii_only)
    assert done.returncode == 0, done.stderr
    assert b"t?che" in done.stdout
    for name in ("results.md", "report.html", "predictions.jsonl", "results.json"):
        assert "tâche" in (run.root / "eval" / name).read_text(encoding="utf-8"), name
