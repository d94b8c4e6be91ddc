"""A loss or a gradient that is no number ends the run, with several processes too, before anything of it is saved."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from mixlora_cli.config import DeepspeedConfig, LaunchConfig
from mixlora_cli.errors import UserError
from mixlora_cli.launch import run_workers
from mixlora_cli.paths import conf_dir
from mixlora_cli.training.run_folder import RunFolder, read_metrics
from mixlora_cli.training.trainer import FiniteGuard

from . import non_finite_runs
from .conftest import MakeConfig

TWO = LaunchConfig(nproc=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_names_step_and_its_own_batch(value: float) -> None:
    guard = FiniteGuard()
    guard.check_loss(torch.tensor(1.0), torch.tensor([1, 2]), 7)
    with pytest.raises(
        UserError, match=rf"^loss is {value} at step 7, in the batch of records 5, 3: .*stopped"
    ):
        guard.check_loss(torch.tensor(value), torch.tensor([5, 3]), 7)


@pytest.mark.parametrize(
    ("norm", "said"),
    [(math.inf, "inf"), (torch.tensor(math.nan), "nan"), (-1.0, "not finite")],  # -1 is DeepSpeed's
)
def test_a_gradient_that_is_no_number_names_all_records_of_its_step(norm: float, said: str) -> None:
    guard = FiniteGuard()
    guard.check_loss(torch.tensor(1.0), torch.tensor([8, 9]), 6)
    for fine in (0.0, 3.5, torch.tensor(2.0)):
        guard.check_gradient(fine, 6)
    guard.check_loss(torch.tensor(1.0), torch.tensor([1, 2]), 7)
    guard.check_loss(torch.tensor(1.0), torch.tensor([4]), 7)
    with pytest.raises(UserError, match=rf"^the gradient's norm is {said} at step 7, in records 1, 2, 4: "):
        guard.check_gradient(norm, 7)


def test_a_gradient_stops_the_run_before_it_is_saved(make_config: MakeConfig) -> None:
    config = make_config("run", "lora", steps=3, save_every=1, batch_size=4)
    with pytest.raises(UserError, match=r"norm is (nan|inf) at step 2, in records \d+, \d+, \d+, \d+:"):
        non_finite_runs.broken_gradient(config)
    run = RunFolder(Path(config.output_dir))
    assert run.newest_checkpoint() == run.checkpoints / "checkpoint-1"
    assert [row["step"] for row in read_metrics(run.metrics)] == [1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "stage", "said"),
    [
        ("broken_loss", "none", r"loss is nan at step 2, in the batch of records \d+, \d+:"),
        (
            "broken_gradient",
            "none",
            r"the gradient's norm is (nan|inf) at step 2, in records \d+, \d+, \d+, \d+:",
        ),
        ("broken_gradient", "zero2", r"the gradient's norm is .* at step 2, in records \d+, \d+, \d+, \d+:"),
    ],
    ids=["loss", "gradient", "gradient-zero2"],
)
def test_one_process_stops_them_all(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, function: str, stage: str, said: str
) -> None:
    """Neither waits for the other for ever; a hang would show as a test that does not end."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = yaml.safe_load((conf_dir() / "deepspeed" / f"{stage}.yaml").read_text())
    config = replace(
        make_config("run", "mixlora", steps=3, save_every=1, batch_size=2),
        deepspeed=DeepspeedConfig(**settings),
    )
    with pytest.raises(UserError) as stopped:
        run_workers(f"non_finite_runs:{function}", config, TWO)
    assert re.match(said, str(stopped.value)), stopped.value
    run = RunFolder(Path(config.output_dir))
    assert run.newest_checkpoint() == run.checkpoints / "checkpoint-1"
    assert not run.finished
