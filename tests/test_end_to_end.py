"""From the command line to an adapter that another process finds again: what a user does, on the tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixlora_cli.evaluation.predictions import read_predictions
from mixlora_cli.evaluation.results import read_results


def _mixlora(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mixlora_cli.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0)
    records = []
    for number in range(12):
        picture = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "images" / f"{number}.png")
        turns = [("human", "<image>\nWhat is it?"), ("gpt", ["cat", "dog", "bird"][number % 3])]
        records.append(
            {
                "id": str(number),
                "task_name": "naming",
                "benchmark": "animals",
                "image": f"{number}.png",
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
        )
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def _predictions(file: Path) -> dict[int, str]:
    return {row.index: row.prediction for row in read_predictions(file).predictions}


def test_a_fresh_process_reloads_the_adapter_to_identical_predictions(folder: Path) -> None:
    data = ["data=json", "data.unseen=data.json", "data.images=images"]
    trained = _mixlora(
        *["train", "model=tiny", *data, "data.train=data.json", "factors=8", "rank=2", "output_dir=run"],
        *["train.steps=6", "train.batch_size=6", "train.learning_rate=0.05"],
        cwd=folder,
    )
    assert trained.returncode == 0, trained.stderr
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        f.name for f in (folder / "run/adapter").iterdir()
    }

    for name, subject in (("first", "run=run"), ("second", "run=run"), ("base", "adapter=none")):
        done = _mixlora(
            "eval", "model=tiny", *data, subject, f"output_dir={name}", "eval.max_new_tokens=4", cwd=folder
        )
        assert done.returncode == 0, done.stderr
    first, second, base = (
        _predictions(folder / name / "predictions.jsonl") for name in ("first", "second", "base")
    )
    assert len(first) == 12
    assert first == second
    assert first != base

    again = _mixlora(
        "train", "model=tiny", *data, "data.train=data.json", "output_dir=run", "factors=8", cwd=folder
    )
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "holds a finished run" in again.stderr


def test_text_alone_from_training_to_scores(tmp_path: Path) -> None:
    """The small language model on the small text tasks: no picture, no processor, no picture features."""
    trained = _mixlora(
        *["train", "model=smollm2_135m", "data=mini_text", "data.tasks=[first_word,last_word]"],
        *[
            "data.max_per_task=2",
            "train.steps=2",
            "train.batch_size=2",
            "factors=4",
            "rank=2",
            "output_dir=run",
        ],
        cwd=tmp_path,
    )
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 2
    assert trained.stdout.splitlines()[-1] == "next: mixlora eval run=run data=mini_text"
    limits = ["eval.limit=2", "eval.max_new_tokens=2", "eval.seen=true"]
    scored = _mixlora("eval", "run=run", "data=mini_text", *limits, cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    results = read_results(tmp_path / "run/eval")
    assert [(score.column, score.n) for score in results.scores] == [
        *(("Come back", 2), ("Largest", 2), ("True/false", 2), ("Year first", 2))
    ]
    assert results.seen is not None and (results.seen.n, len(results.seen.parts)) == (24, 12)
