"""`mixlora prepare` from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mixlora_cli import cli

from .standins import make_parts


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mixlora", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model=null data=null: say what to prepare, e.g. model=llava_v1_7b or data=vision_flan"),
        (["model=llava_v1_7b", "data=mini", "prepare.output=x"], "prepare.output=x: is one folder;"),
        (
            ["model=llava_v1_7b", "prepare.projector=./no.bin"],
            "prepare.projector=./no.bin: no such file or folder;",
        ),
        (
            ["model=llava_v1_7b", "prepare.shards=3"],
            "prepare.shards=3: unknown key; allowed here: prepare.output",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    local = make_parts(tmp_path / "parts").options if "no.bin" in str(arguments) else {}
    more = [f"prepare.{key}={value}" for key, value in local.items() if key != "projector"]
    assert run(monkeypatch, "prepare", *arguments, *more) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith(f"error: {message}")


def test_parts_in_a_model_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    options = [f"prepare.{key}={value}" for key, value in make_parts(tmp_path / "parts").options.items()]
    assert run(monkeypatch, "prepare", "model=llava_v1_7b", *options) == 0
    folder = tmp_path / "cache" / "models" / "llava-v1-7b"
    assert capsys.readouterr().out.strip().endswith(f"model: {folder}")
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
        "prepared.json",
    } <= names
