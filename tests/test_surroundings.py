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

from mixlora_cli.commands import COMMANDS
from mixlora_cli.config import DataConfig
from mixlora_cli.hydra_app import run_command
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


MIXLORA = ("-m", "mixlora_cli.cli")
OF_NOBODY = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
from mixlora_cli.cli import main
main()
"""


def mixlora(
    tmp_path: Path, *arguments: str, program: tuple[str, ...] = MIXLORA, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, under these environment variables; an empty one is taken away."""
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("LC_ALL", "LANG", "PYTHONUTF8")},
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MIXLORA_CACHE": str(tmp_path / "cache"),
        **variables,
    }
    environment = {key: value for key, value in environment.items() if value}
    return subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, env=environment, check=False
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


@pytest.mark.slow
@pytest.mark.parametrize("features", [True, False])
def test_a_user_without_name_and_home_is_told_about_the_cache_and_needs_none_without_features(
    tmp_path: Path, pictures: Path, features: bool
) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps([record("0.png")] * 4))
    done = mixlora(
        tmp_path,
        *("train", "model=tiny", "data=json", f"data.train={file}", f"data.images={pictures}"),
        *("routing=instance", "train.steps=1", "train.batch_size=2", f"train.cache_features={features}"),
        f"output_dir={tmp_path / 'run'}",
        program=("-c", OF_NOBODY),
        **{"HOME": "/dev/null/home", "USER": "", "LOGNAME": "", "MIXLORA_CACHE": "", "XDG_CACHE_HOME": ""},
    )
    if not features:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
        return
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1:] == [
        "error: the cache in /dev/null/home/.cache/mixlora cannot be written: Not a directory; free some space, set "
        "MIXLORA_CACHE to a folder elsewhere, or go without (train.cache_features=false, eval.cache_features=false)"
    ]
    assert b"Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "train", "eval", "plan", "tsne", "export", "interference"])
def test_every_command_says_that_its_folder_cannot_be_written(
    tmp_path: Path, pictures: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps([record(f"{n % 2}.png", f"task {n % 2}") for n in (0, 2, 0, 2)]))
    arguments = ["data=json", f"data.images={pictures}", f"data.train={file}"]
    if command in ("check", "train", "plan"):
        arguments.append("model=tiny")
    else:
        data = DataConfig(name="json", source="json", train=str(file), images=str(pictures))
        arguments.append(f"run={finished_run(tmp_path / 'run', data).root}")
    if command == "eval":
        arguments.append(f"data.unseen={file}")
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "out"
    assert run_command(COMMANDS[command], [*arguments, f"output_dir={place}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1:] == [
        f"error: output_dir={place}: cannot be written (Not a directory); give another output_dir="
    ]
