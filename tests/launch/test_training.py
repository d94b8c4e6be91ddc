"""`mixlora train launch.nproc=2` as a person starts it: stopped, continued, refused, and joined by torchrun."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .conftest import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="signals")]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a training of the tiny model that takes a while."""
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    records = []
    for number in range(8):
        Image.new("RGB", (16, 16), ("red", "blue")[number % 2]).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]
        records.append({"id": str(number), "task_name": "t", "image": f"{number}.png", "conversations": turns})
    (tmp_path / "train.json").write_text(json.dumps(records))
    return [
        *("train", "model=tiny", "data=json", f"data.train={tmp_path}/train.json", f"data.images={tmp_path}"),
        *("rank=2", "factors=4", "routing.health_every=0", "train.log_every=1", "train.batch_size=2"),
        *("train.cache_features=false", f"output_dir={tmp_path}/run"),
    ]


def begin(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def mixlora(*arguments: str) -> subprocess.Popen[str]:
    return begin(sys.executable, "-m", "mixlora_cli.cli", *arguments)


def rows(folder: Path) -> list[Any]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_stopped_by_a_signal_and_continued(command: list[str], tmp_path: Path) -> None:
    two = [*command, "train.steps=2000", "launch.nproc=2"]
    run = mixlora(*two)
    wait_for(lambda: len(rows(tmp_path)) >= 2)
    os.kill(run.pid, signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    done = rows(tmp_path)[-1]["step"]
    assert out.count("finishing this step") == 1
    assert f"stopped after step {done} of 2000, checkpoint saved" in out
    assert "Traceback" not in out
    checkpoint = tmp_path / "run" / "checkpoints" / f"checkpoint-{done}"
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= {path.name for path in checkpoint.iterdir()}

    # With another number of processes other batches would follow.
    alone = mixlora(*command, "train.steps=2000", "launch.nproc=1", "resume=auto")
    out, _ = alone.communicate(timeout=60)
    assert alone.returncode == 2
    assert out.startswith("error: resume: the run began with 2 processes, now there are 1;")

    again = mixlora(*two, "resume=auto")
    wait_for(lambda: rows(tmp_path)[-1]["step"] > done)
    os.killpg(again.pid, signal.SIGINT)
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 128 + signal.SIGINT
    assert f"resuming from {checkpoint}" in out
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, len(rows(tmp_path)) + 1))


def test_a_mistake_in_the_workers_is_one_line_in_a_sweep_too(command: list[str]) -> None:
    wrong = [text for text in command if not text.startswith("output_dir")]
    run = mixlora(*wrong, "-m", "seed=0,1", "launch.nproc=2", "train.scheduler=spiral", "output_dir=run-${seed}")
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 2
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert [error.split(": train.scheduler=spiral: must be one of ")[0] for error in errors] == [
        "error: job 0 (seed=0 launch.nproc=2 train.scheduler=spiral output_dir=run-${seed})",
        "error: job 1 (seed=1 launch.nproc=2 train.scheduler=spiral output_dir=run-${seed})",
    ] or all("train.scheduler=spiral: must be one of" in error for error in errors)
    assert len(errors) == 2
    assert "Traceback" not in out


def test_torchrun_is_joined(command: list[str], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = begin(*torchrun, "-m", "mixlora_cli.cli", *command, "train.steps=2", "deepspeed=zero1")
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 0, out
    assert out.count("done: 2 steps") == 1
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["processes"] == 2
