"""A training that is killed, or whose disk is full, loses nothing: resumed, it ends with the same bits."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL, SIGXFSZ
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixlora_cli.config import RoutingConfig, TrainConfig
from mixlora_cli.training.run_folder import RunFolder, missing_from, read_metrics

from .conftest import MakeConfig

pytestmark = pytest.mark.slow

STEPS = 6
RunJobs = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run_jobs(tmp_path: Path) -> RunJobs:
    """`run_jobs({"config": ..., "at_step": 3}, ...)`: one after the other; how each ended and what it said."""

    def run(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
        path = tmp_path / "jobs.pickle"
        path.write_bytes(pickle.dumps(jobs))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        ended: list[dict[str, Any]] = json.loads(done.stdout)
        return ended

    return run


def again(config: TrainConfig) -> TrainConfig:
    return replace(config, resume="auto")


def assert_same_end(one: TrainConfig, other: TrainConfig) -> None:
    """Adapter and losses, bit for bit."""
    first, second = (RunFolder(Path(config.output_dir)) for config in (one, other))
    assert first.finished
    assert second.finished
    assert_same_weights(first.adapter, second.adapter)
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run.metrics)] for run in (first, second)]
    assert losses[0] == losses[1]
    assert not list(second.root.rglob("*.partial"))


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "instance": ("mixlora", {"batch_size": 2, "accumulation": 2, "group_by_length": True}),
    "random": ("mixlora", {"batch_size": 4, "group_by_length": True, "cache_features": True}),
    "lora": ("lora", {"batch_size": 2, "accumulation": 2, "group_by_length": False}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_killed_at_many_steps_it_ends_with_the_same_bits(
    make_config: MakeConfig, run_jobs: RunJobs, name: str
) -> None:
    """Three steps an epoch, a checkpoint at every other one: kills before the first, right after and far from one."""
    adapter, values = VARIANTS[name]
    whole, cut = (
        make_config(folder, adapter, steps=STEPS, save_every=2, dropout=0.2, **values)
        for folder in ("whole", "cut")
    )
    if name == "random":
        whole, cut = (replace(config, routing=RoutingConfig(name="random")) for config in (whole, cut))
    ended = run_jobs(
        {"config": whole},
        {"config": cut, "at_step": 1},
        {"config": again(cut), "at_step": 3},
        {"config": again(cut), "at_step": 4},  # before its checkpoint: steps 3 and 4 are done a third time
        {"config": again(cut), "at_step": 5},
        {"config": again(cut), "at_save": (6, 12)},
        {"config": again(cut)},
    )
    assert [job["status"] for job in ended] == [0, *[-SIGKILL] * 5, 0], ended
    starts = ["no checkpoint in", "checkpoint-2", "checkpoint-2", "checkpoint-4", "checkpoint-4"]
    assert all(start in job["said"].splitlines()[0] for start, job in zip(starts, ended[2:], strict=True))
    assert_same_end(whole, cut)


def test_killed_anywhere_in_a_save_there_is_a_whole_checkpoint(
    make_config: MakeConfig, run_jobs: RunJobs
) -> None:
    """Before every fifth thing that is done to a file while the second checkpoint is written and the first goes."""
    numbers: dict[str, Any] = {"steps": 3, "save_every": 1, "keep_checkpoints": 1}
    whole = make_config("whole", steps=3, save_every=1, keep_checkpoints=5)
    counted = run_jobs({"config": whole}, {"config": make_config("counted", **numbers), "at_save": (2, -1)})
    events = next(json.loads(line)["events"] for line in counted[1]["said"].splitlines() if "events" in line)
    assert events > 30
    moments = range(0, events, 5)
    cuts = [make_config(f"cut{nth}", **numbers) for nth in moments]
    ended = run_jobs(*({"config": cut, "at_save": (2, nth)} for nth, cut in zip(moments, cuts, strict=True)))
    assert {job["status"] for job in ended} == {-SIGKILL}

    expected = RunFolder(Path(whole.output_dir)).checkpoints
    left = []
    for cut in cuts:
        newest = RunFolder(Path(cut.output_dir)).newest_checkpoint()
        assert newest is not None, cut.output_dir
        left.append(newest.name)
        same = expected / newest.name
        assert_same_weights(newest, same)
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            assert (newest / file).read_bytes() == (same / file).read_bytes(), (cut.output_dir, file)
    first = left.index("checkpoint-2")
    assert left == ["checkpoint-1"] * first + ["checkpoint-2"] * (len(cuts) - first)
    assert first > 0

    picked = [cuts[0], cuts[first // 2], cuts[first - 1], cuts[first], cuts[-1]]
    run_jobs(*({"config": again(cut)} for cut in picked))
    for cut in picked:
        assert_same_end(whole, cut)


@pytest.fixture
def saved(make_config: MakeConfig, run_jobs: RunJobs) -> tuple[TrainConfig, dict[str, int]]:
    """A finished run, and sizes at which its adapter's file or (larger) its optimizer's file is half written."""
    whole = make_config("whole", "lora", steps=2, save_every=1)
    assert run_jobs({"config": whole})[0]["status"] == 0
    checkpoint = RunFolder(Path(whole.output_dir)).newest_checkpoint()
    assert checkpoint is not None
    adapter, optimizer = (
        (checkpoint / file).stat().st_size for file in ("adapter_model.safetensors", "optimizer.pt")
    )
    assert adapter < optimizer
    return whole, {"adapter": adapter // 2, "optimizer": (adapter + optimizer) // 2}


def test_killed_in_the_middle_of_a_write(
    make_config: MakeConfig, run_jobs: RunJobs, saved: tuple[TrainConfig, dict[str, int]]
) -> None:
    whole, sizes = saved
    for name, size in sizes.items():
        cut = make_config(name, "lora", steps=2, save_every=1)
        killed, resumed = run_jobs({"config": cut, "at_bytes": size}, {"config": again(cut)})
        assert (killed["status"], resumed["status"]) == (-SIGXFSZ, 0), (killed, resumed)
        assert "checkpoint-1\n" in resumed["said"]
        assert_same_end(whole, cut)


def test_writes_that_fail_are_one_line_and_leave_the_checkpoint_before(
    make_config: MakeConfig, run_jobs: RunJobs, saved: tuple[TrainConfig, dict[str, int]]
) -> None:
    whole, sizes = saved
    for name, size in sizes.items():
        cut = make_config(name, "lora", steps=2, save_every=1)
        failed, resumed = run_jobs({"config": cut, "full_at_bytes": size}, {"config": again(cut)})
        assert failed["status"] == 2, failed
        assert_says_what_to_do(failed)
        assert resumed["status"] == 0
        assert_same_end(whole, cut)


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(
    make_config: MakeConfig, run_jobs: RunJobs, little_disk: Path
) -> None:
    whole = make_config("whole", steps=3, save_every=1, keep_checkpoints=3)
    cut = replace(whole, output_dir=str(little_disk / "run"))
    run_jobs({"config": whole})
    one = RunFolder(Path(whole.output_dir)).checkpoints / "checkpoint-1"
    pages = sum(-(-path.stat().st_size // 4096) for path in one.rglob("*"))
    assert pages > 10
    resize(little_disk, int(1.6 * pages) * 4096)  # room for one, and half of another

    (failed,) = run_jobs({"config": cut})
    assert failed["status"] == 2, failed
    assert_says_what_to_do(failed)
    run = RunFolder(Path(cut.output_dir))
    checkpoint = run.newest_checkpoint()
    assert checkpoint is not None
    assert missing_from(checkpoint) is None
    assert_same_weights(checkpoint, RunFolder(Path(whole.output_dir)).checkpoints / checkpoint.name)

    resize(little_disk, 5_000_000)
    (resumed,) = run_jobs({"config": again(cut)})
    assert resumed["status"] == 0, resumed
    assert_same_end(whole, cut)


def assert_says_what_to_do(failed: dict[str, Any]) -> None:
    (line,) = [json.loads(line)["error"] for line in failed["said"].splitlines() if line.startswith("{")]
    assert "cannot be written: " in line
    assert "MB free there); checkpoint-1 is intact; make room and continue with resume=auto" in line
    assert "Traceback" not in failed["said"]
