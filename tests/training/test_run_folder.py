"""What a run folder allows: never a finished run lost, never a resumed run changed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from mixlora_cli.errors import UserError
from mixlora_cli.models import forward as precision
from mixlora_cli.output import LOCK
from mixlora_cli.training.run_folder import RunFolder, essentials, versions, write_manifest
from mixlora_cli.training.train import train

from .conftest import MakeConfig


def checkpoint(run: RunFolder, step: int, complete: bool = True) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    if complete:
        write_manifest(folder)
    return folder


def test_a_new_folder_starts_new_and_records_what_was_asked(make_config: MakeConfig) -> None:
    config = make_config("run", resume="auto")
    run = RunFolder(Path(config.output_dir))
    assert run.open(config) is None
    assert not run.root.exists()
    run.begin(config, None)
    assert OmegaConf.to_container(OmegaConf.load(run.config)) == asdict(config)
    recorded = json.loads(run.versions.read_text())
    assert recorded == {**versions(), "threads": torch.get_num_threads(), "number_format": "float32"}
    assert recorded["python"] == platform.python_version()
    assert set(recorded["packages"]) >= {"torch", "transformers", "peft", "mixlora-cli"}


def test_a_finished_run_is_not_replaced_silently(make_config: MakeConfig) -> None:
    config = make_config("run")
    run = RunFolder(Path(config.output_dir))
    run.begin(config, None)
    run.result.write_text(json.dumps({"steps": 2}))
    for resume in (None, "auto"):
        with pytest.raises(UserError, match=r"finished run; choose another output_dir=, or overwrite=true"):
            run.open(replace(config, resume=resume))

    old = checkpoint(run, 2)
    (run.root / "notes.txt").write_text("mine")
    again = replace(config, overwrite=True)
    assert run.open(again) is None
    assert run.finished  # checking destroys nothing
    run.begin(again, None)
    assert not run.finished
    assert not old.exists()
    assert (run.root / "notes.txt").read_text() == "mine"


def test_an_unfinished_run_needs_a_word(make_config: MakeConfig) -> None:
    config = make_config("run")
    run = RunFolder(Path(config.output_dir))
    run.begin(config, None)
    with pytest.raises(
        UserError, match=r"unfinished run; resume=auto continues it, overwrite=true starts again"
    ):
        run.open(config)
    assert run.open(replace(config, overwrite=True)) is None


def test_auto_takes_the_newest_complete_checkpoint(make_config: MakeConfig) -> None:
    config = make_config("run", resume="auto")
    run = RunFolder(Path(config.output_dir))
    run.begin(config, None)
    assert run.open(config) is None
    checkpoint(run, 5)
    newest = checkpoint(run, 20)
    checkpoint(run, 100, complete=False)
    assert run.open(config) == newest
    assert run.open(replace(config, overwrite=True)) == newest  # the same command with resume=auto added
    run.begin(config, newest)
    assert newest.is_dir()


def test_resume_refuses_a_configuration_that_changes_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("run")
    run = RunFolder(Path(config.output_dir))
    run.begin(config, None)
    checkpoint(run, 1)
    changed = replace(
        config,
        rank=1,
        resume="auto",
        train=replace(config.train, learning_rate=1.0, save_every=7, log_every=3),
    )
    with pytest.raises(UserError) as caught:
        run.open(changed)
    assert "rank (was 2, now 1), train.learning_rate (was 0.01, now 1.0);" in str(caught.value)
    assert "_every" not in str(caught.value)
    harmless = replace(
        config, resume="auto", overwrite=True, train=replace(config.train, save_every=7, log_every=3)
    )
    assert run.open(harmless) == run.newest_checkpoint()


def test_paths_that_cannot_be_used(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("run")
    with pytest.raises(UserError, match="no complete checkpoint there"):
        RunFolder(Path(config.output_dir)).open(replace(config, resume=str(tmp_path)))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="is a file"):
        RunFolder(file).open(config)


def test_resume_refuses_another_number_format(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`precision=auto` is not the same on every machine."""
    config = make_config("run", resume="auto")
    config = replace(config, train=replace(config.train, precision="auto"))
    run = RunFolder(Path(config.output_dir))
    run.begin(config, None)
    newest = checkpoint(run, 2)
    assert run.open(config) == newest
    monkeypatch.setattr(precision, "choose_dtype", lambda _: torch.bfloat16)
    with pytest.raises(
        UserError, match=r"began in float32, but train\.precision=auto is bfloat16 on this machine"
    ):
        run.open(config)


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_second_training_stops_before_it_changes_anything(
    make_config: MakeConfig, resume: str | None
) -> None:
    config = make_config("run", overwrite=True, resume=resume)
    code = "import sys; from pathlib import Path; from mixlora_cli.output import alone_in\n"
    code += (
        "with alone_in(Path(sys.argv[1]), 'training'):\n    print('holds', flush=True); sys.stdin.readline()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, config.output_dir]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n"
        with pytest.raises(
            UserError, match=rf"^output_dir=.*: another training writes here \(process {other.pid} "
        ):
            train(config)
        assert [path.name for path in Path(config.output_dir).iterdir()] == [LOCK]
        other.communicate("\n")
    assert not Path(config.output_dir).exists()
    train(config)
    assert RunFolder(Path(config.output_dir)).finished
    assert not (Path(config.output_dir) / LOCK).exists()


def test_a_folder_that_cannot_be_made_is_said_before_the_data_is_read(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    config = make_config("file/run")
    Path(str(config.data.train)).unlink()
    with pytest.raises(UserError) as stop:
        train(config)
    assert str(stop.value) == (
        f"output_dir={config.output_dir}: cannot be written (Not a directory); give another output_dir="
    )


def test_no_place_for_the_cache_is_said_before_the_data_is_read(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "file" / "cache"))
    config = make_config("run", cache_features=True)
    with pytest.raises(UserError) as stop:
        train(config)
    assert str(stop.value) == (
        f"the cache in {tmp_path / 'file' / 'cache'} cannot be written: Not a directory; free some space, set "
        "MIXLORA_CACHE to a folder elsewhere, or go without (train.cache_features=false, eval.cache_features=false)"
    )
    assert not Path(config.output_dir).exists()
    train(make_config("run"))  # without features it needs none
    assert RunFolder(tmp_path / "run").finished


def test_a_later_key_at_its_neutral_value_leaves_no_trace() -> None:
    """Kept results and unfinished runs are named by what decides a training, and stay valid."""
    before = {"model": {"name": "mini"}, "seed": 0}
    assert essentials({**before, "model": {"name": "mini", "quantization": "none"}}) == essentials(before)
    quantised = {**before, "model": {"name": "mini", "quantization": "nf4"}}
    assert essentials(quantised) == {**essentials(before), "model.quantization": "nf4"}
