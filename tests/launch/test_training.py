"""`mixlora train launch.nproc=2` as a person starts it: stopped, continued, refused, and joined by torchrun."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .conftest import LAST_WORD, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="signals")]


MIXLORA = ["-m", "mixlora_cli.cli"]
MAIN = """
from mixlora_cli.cli import main

if __name__ == "__main__":
    main()
"""
SECONDS = 900  # that no step takes, however busy the machine is


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a training of the tiny model that takes a while."""
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    records = []
    for number in range(8):
        Image.new("RGB", (16, 16), ("red", "blue")[number % 2]).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]
        records.append(
            {"id": str(number), "task_name": "t", "image": f"{number}.png", "conversations": turns}
        )
    (tmp_path / "train.json").write_text(json.dumps(records))
    return [
        *("train", "model=tiny", "data=json", f"data.train={tmp_path}/train.json", f"data.images={tmp_path}"),
        *("rank=2", "factors=4", "routing.health_every=0", "train.log_every=1", "train.batch_size=2"),
        *("train.cache_features=false", f"output_dir={tmp_path}/run"),
    ]


@pytest.fixture
def begin() -> Iterator[Any]:
    """`begin("-m", "module", ...)` starts Python; what is still running after the test is killed."""
    started = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        settings: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([sys.executable, *arguments], start_new_session=True, **settings))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def rows(folder: Path) -> list[Any]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_stopped_by_a_signal_and_continued(begin: Any, command: list[str], tmp_path: Path) -> None:
    two = [*command, "train.steps=2000", "launch.nproc=2"]
    run = begin(*MIXLORA, *two)
    wait_for(lambda: len(rows(tmp_path)) >= 2, SECONDS)
    os.kill(run.pid, signal.SIGTERM)
    out, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 128 + signal.SIGTERM
    done = rows(tmp_path)[-1]["step"]
    assert out.count("finishing this step") == 1
    assert f"stopped after step {done} of 2000, checkpoint saved" in out
    assert "Traceback" not in out
    checkpoint = tmp_path / "run" / "checkpoints" / f"checkpoint-{done}"
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= {
        path.name for path in checkpoint.iterdir()
    }

    # With another number of processes other batches would follow.
    alone = begin(*MIXLORA, *command, "train.steps=2000", "launch.nproc=1", "resume=auto")
    out, _ = alone.communicate(timeout=SECONDS)
    assert alone.returncode == 2
    assert out.startswith("error: resume: the run began with 2 processes, now there are 1;")

    again = begin(*MIXLORA, *two, "resume=auto")
    wait_for(lambda: rows(tmp_path)[-1]["step"] > done, SECONDS)
    os.killpg(again.pid, signal.SIGINT)
    out, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == 128 + signal.SIGINT
    assert f"resuming from {checkpoint}" in out
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, len(rows(tmp_path)) + 1))


def test_a_mistake_in_the_workers_is_one_line_for_each_job_of_a_sweep(begin: Any, command: list[str]) -> None:
    wrong = [text for text in command if not text.startswith("output_dir")]
    run = begin(
        *MIXLORA,
        *wrong,
        "-m",
        "seed=0,1",
        "launch.nproc=2",
        "train.scheduler=spiral",
        "output_dir=run-${seed}",
    )
    out, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 2
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert [error[: len("error: job 0 ")] for error in errors] == ["error: job 0 ", "error: job 1 "]
    assert all("train.scheduler=spiral: must be one of" in error for error in errors)
    assert "Traceback" not in out


def test_torchrun_is_joined_and_the_group_left(begin: Any, command: list[str], tmp_path: Path) -> None:
    """Two jobs share the group, which is gone before the interpreter is: its threads could not end without that."""
    program = tmp_path / "program.py"
    program.write_text(LAST_WORD + MAIN)
    wanted = [text for text in command if not text.startswith("output_dir")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    sweep = ["-m", "seed=0,1", f"output_dir={tmp_path}/run-${{seed}}"]
    run = begin(*torchrun, str(program), *wanted, "train.steps=2", "deepspeed=zero1", *sweep)
    out, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, out
    assert out.count("done: 2 steps") == 2
    assert out.count("in a group at the end: False") == 2
    recorded = json.loads((tmp_path / "run-1" / "versions.json").read_text())
    assert recorded["processes"] == 2
    assert recorded["command"][0] == "mixlora train"
