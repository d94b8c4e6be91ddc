"""A small data set with seen and unseen tasks, and finished MixLoRA runs of the tiny model whose routers differ."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mixlora_cli.config import DataConfig, MapConfig, TsneConfig
from mixlora_cli.training.run_folder import RunFolder
from tiny_runs import TINY, finished_run

SEEN, UNSEEN = ("counting", "naming things/now"), ("mini_vsr", "mini_pope")
FEW: dict[str, Any] = {"permutations": 20, "sides": ["a"], "layers": [1]}
"""Little to draw; the selections of all layers are kept all the same."""
ATTACK = "</script><script>alert('&amp;')</script>"

MakeRun = Callable[..., RunFolder]
MakeConfig = Callable[..., TsneConfig]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _records(split: str, tasks: tuple[str, ...], count: int, images: Path) -> list[dict[str, Any]]:
    generator = random.Random(split)
    records = []
    for number in range(count):
        # Every other picture is a copy of the one before, under a name of its own.
        colours = random.Random(f"{split}{number // 2}").randbytes(16 * 16 * 3)
        name = f"{split}{number}.png"
        Image.frombytes("RGB", (16, 16), colours).save(images / name)
        words = " ".join(generator.choices(["red", "big", "dog", "left", "seven"], k=number % 5))
        record: dict[str, Any] = {
            "id": f"{split}-{number}",
            "task_name": tasks[number % len(tasks)],
            "conversations": [
                {"from": "human", "value": f"What is it? {words}{ATTACK if number == 1 else ''}"},
                {"from": "gpt", "value": generator.choice(["yes", "no"])},
            ],
        }
        if split == "unseen":
            record["benchmark"] = record["task_name"]
        if number % 7:
            record["image"] = name
        records.append(record)
    return records


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Eight instances of each of two seen and two unseen tasks; every seventh is without a picture."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    for split, tasks in (("heldout", SEEN), ("unseen", UNSEEN)):
        (root / f"{split}.json").write_text(json.dumps(_records(split, tasks, 16, root / "images")))
    definitions = {task: {"definition": f"Do {task}."} for task in (*SEEN, *UNSEEN, "trained alone")}
    (root / "definitions.json").write_text(json.dumps(definitions))
    return DataConfig(
        name="json",
        source="json",
        heldout=str(root / "heldout.json"),
        unseen=str(root / "unseen.json"),
        images=str(root / "images"),
        metadata=str(root / "definitions.json"),
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_run(tmp_path: Path, data: DataConfig) -> MakeRun:
    """`make_run("lora")`, `make_run(pool="prompt")`: what `mixlora train` leaves, without the training."""

    def make(name: str = "mixlora", routing: str = "instance", **fields: Any) -> RunFolder:
        folder = tmp_path / f"run-{name}-{routing}-{len(fields)}"
        # Pooled inputs of the tiny model are much alike: only large routers tell instances apart.
        return finished_run(folder, data, name, routing, router_spread=50, **fields)

    return make


@pytest.fixture
def make_config(data: DataConfig) -> MakeConfig:
    """`make_config(run.root, tasks=[...], batch_size=1)`: keywords of `MapConfig` or `TsneConfig`."""

    def make(run: Path, **values: Any) -> TsneConfig:
        top = {
            key: values.pop(key)
            for key in ("output_dir", "seed", "data", "model", "tasks", "pairs")
            if key in values
        }
        settings = MapConfig(**{**FEW, "batch_size": 4, "cache_features": False, **values})
        whole = {"model": TINY, "data": data, "output_dir": str(run / "tsne"), **top}
        return TsneConfig(tsne=settings, run=str(run), **whole)

    return make


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of a run this small goes into its figures."""
    monkeypatch.setattr("mixlora_cli.analysis.selections.run.draw_all", lambda *_: [])
