"""Evaluation in several real processes: the same answers as in one, and nothing lost when they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foolbox_rows import foolbox_rows, table
from mixlora_cli.benchmarks.registry import BENCHMARKS
from mixlora_cli.config import AdapterConfig, EvalConfig
from mixlora_cli.evaluation.evaluate import evaluate
from mixlora_cli.evaluation.predictions import read_predictions
from mixlora_cli.launch import ProcessGroup
from tiny_runs import finished_run


def test_shares_are_disjoint_and_whole() -> None:
    items = list(range(11))
    shares = [ProcessGroup(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert [len(share) for share in shares] == [4, 4, 3]


@pytest.fixture
def adapted(config: EvalConfig, tmp_path: Path) -> EvalConfig:
    """A MixLoRA adapter, several instances at once, seven benchmarks of the data, one from a local copy, seen tasks."""
    (tmp_path / "mnist").mkdir()
    copy = tmp_path / "mnist" / "test-00000-of-00001.parquet"
    table("mnist", foolbox_rows("mnist")).to_parquet(str(copy))
    names = [name for name in BENCHMARKS if name.startswith("mini_") and name != "mini_mnist"]
    asked = replace(
        config.eval, seen=True, benchmarks=[*names, "mnist"], sources={"mnist": str(tmp_path / "mnist")}
    )
    run = finished_run(tmp_path / "run", config.data)
    return replace(config, adapter=AdapterConfig(name="mixlora"), run=str(run.root), eval=asked)


def arguments(config: EvalConfig, folder: Path, processes: int) -> list[str]:
    data, asked = config.data, config.eval
    given = [
        "eval", "model=tiny", "data=json", f"data.unseen={data.unseen}", f"data.heldout={data.heldout}",
        f"data.images={data.images}", f"eval.max_new_tokens={asked.max_new_tokens}", "eval.seen=true",
        f"eval.batch_size={asked.batch_size}", f"launch.nproc={processes}", f"output_dir={folder}",
    ]  # fmt: skip
    given += ["adapter=none"] if config.run is None else [f"run={config.run}"]
    given += [f"eval.benchmarks=[{','.join(asked.benchmarks)}]"] if asked.benchmarks else []
    sources = ", ".join(f"{name}: {path}" for name, path in (asked.sources or {}).items())
    return given + ([f"eval.sources={{{sources}}}"] if sources else [])


def environment() -> dict[str, str]:
    kept = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def answers(folder: Path) -> dict[Any, str]:
    return {each.key: each.prediction for each in read_predictions(folder / "predictions.jsonl").predictions}


def losses(folder: Path) -> dict[Any, float]:
    found = read_predictions(folder / "predictions.jsonl").predictions
    return {each.key: each.nll for each in found if each.nll is not None}


@pytest.mark.slow
def test_two_processes_answer_as_one_does_and_a_killed_one_continues(
    adapted: EvalConfig, tmp_path: Path
) -> None:
    """Alone eight instances are answered at once, in two processes three: the answers are the same."""
    results = evaluate(adapted)
    expected, of_one = answers(Path(adapted.output_dir)), losses(Path(adapted.output_dir))
    assert len(expected) == 51 - 4 + 20  # the digits of the data make room for a copy's
    assert results.label == "MixLoRA E=6 r=2"
    assert next(each.n for each in results.scores if each.column == "MNIST") == 20
    assert len(set(expected.values())) > 30  # not one answer to everything

    folder, split = tmp_path / "two", replace(adapted, eval=replace(adapted.eval, batch_size=3))
    command = [sys.executable, "-m", "mixlora_cli.cli", *arguments(split, folder, 2)]
    first = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, start_new_session=True)
    shard = folder / "predictions.rank1.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and first.poll() is None:
        if shard.is_file() and len(shard.read_bytes().splitlines()) > 2:
            break
        time.sleep(0.005)
    caught_in_the_middle = first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = sum(len(path.read_bytes().splitlines()) for path in folder.glob("predictions*.jsonl"))

    again = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert caught_in_the_middle
    assert before > 2
    assert "continuing: " in again.stderr
    assert answers(folder) == expected
    assert [path.name for path in folder.glob("predictions*")] == ["predictions.jsonl"]
    found = json.loads((folder / "results.json").read_text())
    assert {each["column"]: each["value"] for each in found["scores"]} == {
        each.column: each.value for each in results.scores
    }
    assert results.seen is not None
    assert found["seen"]["value"] == results.seen.value
    assert losses(folder) == {key: pytest.approx(nll, rel=1e-5) for key, nll in of_one.items()}
    assert results.loss is not None and len(of_one) == results.loss.n == 10
    assert found["loss"]["value"] == pytest.approx(results.loss.value)


@pytest.mark.slow
def test_a_mistake_is_said_once_whatever_the_number_of_processes(config: EvalConfig, tmp_path: Path) -> None:
    mistaken = replace(config, eval=replace(config.eval, benchmarks=["mini_mni"]))
    command = [sys.executable, "-m", "mixlora_cli.cli", *arguments(mistaken, tmp_path / "out", 2)]
    found = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert found.returncode == 2
    assert found.stderr.count("Did you mean mini_mnist?") == 1
