"""`mixlora prepare`: what cannot be prepared is one line, and a prepared model is not touched again."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mixlora_cli import cli
from mixlora_cli.config import ModelConfig, PrepareConfig, PrepareOptions
from mixlora_cli.errors import UserError
from mixlora_cli.models.load import build_base
from mixlora_cli.prepare import parts as parts_module
from mixlora_cli.prepare.run import prepare

from .standins import VOCABULARY, Parts

MODEL = ModelConfig("llava_v1_7b", "prepared", chat_template="v1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model=null data=null: say what to prepare, e.g. model=llava_v1_7b or data=vision_flan"),
        (["model=llava_v1_7b", "data=mini", "prepare.output=x"], "prepare.output=x: is one folder;"),
        (
            ["model=llava_v1_7b", "prepare.projector=./no.bin"],
            "prepare.projector=./no.bin: no such file or folder; give one with mm_projector.bin, or a hub id",
        ),
        (
            ["model=llava_v1_7b", "prepare.output=/dev/null/x"],
            "prepare.output=/dev/null/x: cannot be written (Not a directory)",
        ),
        (
            ["model=llava_v1_7b", "prepare.shards=3"],
            "prepare.shards=3: unknown key; allowed here: prepare.output",
        ),
        ([], None),
    ],
)
def test_from_the_command_line(
    arguments: list[str],
    message: str | None,
    parts: Parts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    local = [f"prepare.{key}={value}" for key, value in parts.options.items()]
    if message is None:
        arguments = ["model=llava_v1_7b", *local]
    elif "no.bin" in message:
        arguments = [*arguments, *local[:2]]
    monkeypatch.setattr(sys, "argv", ["mixlora", "prepare", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = capsys.readouterr()
    if message is not None:
        assert stop.value.code == 2
        assert told.err.strip().splitlines()[-1].startswith(f"error: {message}")
        return
    folder = tmp_path / "cache" / "models" / "llava-v1-7b"
    assert (stop.value.code or 0, told.out.strip()) == (0, f"model: {folder}")
    needed = {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "prepared.json"}
    assert needed <= {path.name for path in folder.iterdir()}


def test_prepared_where_training_looks(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    options = PrepareOptions(**parts.options)
    (made,) = prepare(PrepareConfig(model=MODEL, prepare=options))
    assert made == tmp_path / "cache" / "models" / "llava-v1-7b"
    assert [file.name for file in made.parent.iterdir() if not file.name.endswith(".lock")] == ["llava-v1-7b"]
    assert build_base(MODEL).chat.image_token_ids[0] == VOCABULARY

    written = (made / "model.safetensors").stat().st_mtime_ns
    assert prepare(PrepareConfig(model=MODEL, prepare=options)) == [made]
    assert (made / "model.safetensors").stat().st_mtime_ns == written
    elsewhere = replace(options, projector=str(parts.projector / "mm_projector.bin"))
    with pytest.raises(UserError, match=r"prepare\.projector=.*was made with .*overwrite=true replaces it"):
        prepare(PrepareConfig(model=MODEL, prepare=elsewhere))
    prepare(PrepareConfig(model=MODEL, prepare=replace(elsewhere, overwrite=True)))
    assert (made / "model.safetensors").stat().st_mtime_ns != written


def test_a_folder_with_something_else_is_left_alone(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    options = PrepareOptions(output=str(tmp_path), **parts.options)
    with pytest.raises(UserError, match="holds something else than a prepared model"):
        prepare(PrepareConfig(model=MODEL, prepare=options))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_small_disk_is_noticed_before_writing(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    options = PrepareOptions(output=str(tmp_path / "models" / "out"), **parts.options)
    with pytest.raises(UserError, match=r"writing the assembled model needs 0\.0 GB in"):
        prepare(PrepareConfig(model=MODEL, prepare=options))
    assert [file.suffix for file in (tmp_path / "models").iterdir()] in ([], [".lock"])


@pytest.mark.parametrize("name", ["mini", "tiny"])
def test_models_that_need_no_preparation(name: str) -> None:
    with pytest.raises(UserError, match=f"model={name} needs no preparation"):
        prepare(PrepareConfig(model=ModelConfig(name, name)))  # type: ignore[arg-type]
