"""Run the command line in this process, with stand-ins for the functions that it would call."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixlora_cli import cli

ENTRIES = {
    "mixlora_cli.training.train": "train",
    "mixlora_cli.evaluation.evaluate": "evaluate",
    "mixlora_cli.prepare.align.run": "align",
    "mixlora_cli.analysis.export.run": "export",
    "mixlora_cli.serving.ask": "ask",
}


@dataclass
class Commands:
    """What the commands were called with, and what they do then."""

    called: list[Any] = field(default_factory=list)
    does: Callable[[Any], None] = lambda config: None

    def __call__(self, config: Any) -> None:
        self.called.append(config)
        self.does(config)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Stand-ins for train, evaluate and align; the working directory is a new empty one."""
    monkeypatch.chdir(tmp_path)
    recorder = Commands()
    for module, function in ENTRIES.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: recorder}))
    return recorder


@dataclass(frozen=True)
class Result:
    """What a command printed and the code it exited with."""

    code: int
    out: str
    err: str


Mixlora = Callable[..., Result]


@pytest.fixture
def mixlora(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Mixlora:
    """`mixlora("train", "rank=8")` runs that command line."""

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["mixlora", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return Result(int(stop.value.code or 0), printed.out, printed.err)

    return run
