"""`conf/export.yaml` says what the dataclass says, and the command line answers mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from mixlora_cli.config import ExportConfig, FitConfig
from mixlora_cli.config.load import load
from mixlora_cli.hydra_app import Command, register_resolvers, run_command
from mixlora_cli.paths import conf_dir

COMMAND = Command("export", ExportConfig, "mixlora_cli.analysis.export.run:export")


def test_yaml_repeats_the_defaults(tmp_path: Path) -> None:
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = load(ExportConfig, compose("export", [f"run={tmp_path}"]))
    assert config.export == FitConfig()
    assert (config.output_dir, config.seed, config.overwrite) == (f"{tmp_path}/export", 0, False)
    assert (config.model.name, config.data.name) == ("mini", "mini")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run=null: give run=<folder of a finished `mixlora train adapter=mixlora`>"),
        (["run=nowhere"], "run=nowhere: must be an existing folder"),
        (["run=here", "export.rank=0"], "export.rank=0: must be > 0 or null"),
        (["run=here", "export.split=test"], "export.split=test: must be one of train, heldout, unseen"),
        (["run=here", "export.pertask=true"], "did you mean export.per_task?"),
    ],
)
def test_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert run_command(COMMAND, arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_help_names_groups_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(COMMAND, ["--help"]) == 0
    printed = capsys.readouterr().out
    assert (
        "  data:       json, mini" in printed
        and "\nexport:\n" in printed
        and "  per_task: false\n" in printed
    )
