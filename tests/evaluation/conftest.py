"""A tiny model and a small data set with all eight benchmarks and two seen tasks."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mixlora_cli.config import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    GenerationConfig,
    ModelConfig,
    RoutingConfig,
)
from mixlora_cli.models.load import LoadedModel
from mixlora_cli.models.tiny import build_tiny

NUM_IMAGES = 6
TINY = ModelConfig(name="tiny", source="tiny")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def base() -> LoadedModel:
    return build_tiny()


def raw(number: int, task: str, question: str, answer: str, **extra: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    image = f"{number % NUM_IMAGES}.png"
    return {"id": f"{task}-{number}", "task_name": task, "image": image, "conversations": turns, **extra}


def unseen_records() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []

    def add(benchmark: str, question: str, answer: str, **extra: Any) -> None:
        task = benchmark.removeprefix("mini_")
        records.append(raw(len(records), task, question, answer, benchmark=benchmark, **extra))

    for image in range(4):
        subtask = ("count", "color")[image % 2]
        for answer in ("yes", "no"):
            about = {"category": subtask, "image_id": f"m{image}"}
            add("mini_mme", f"Is it {answer}? " * (image + 1), answer, **about)
    for image in range(3):
        for number, category in enumerate(("random", "popular", "adversarial")):
            about = {"category": category, "image_id": f"p{image}"}
            add("mini_pope", f"Is there a dog in picture {image}?", ("yes", "no")[number % 2], **about)
    for number in range(4):
        add("mini_textvqa", f"What does sign {number} say?", "stop", answers=["stop"] * 7 + ["stop sign"] * 3)
        add("mini_vsr", "Is the cat left of the dog?", ("yes", "no")[number % 2], labels=["yes", "no"])
        add(
            "mini_snli_ve",
            "Does it follow?",
            ("yes", "no", "maybe")[number % 3],
            labels=["yes", "no", "maybe"],
        )
        add(
            "mini_cifar10",
            "What is it?",
            ("cat", "dog")[number % 2],
            labels=["cat", "dog", "maple tree", "tree"],
        )
        add("mini_cifar100", "Name the object.", "tree", labels=["tree", "maple tree"])
        add("mini_mnist", "Which digit?", str(number))
    return records


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    generator = random.Random(0)
    for number in range(NUM_IMAGES):
        picture = Image.frombytes("RGB", (16, 16), generator.randbytes(16 * 16 * 3))
        picture.save(root / "images" / f"{number}.png")
    seen = [raw(n, ("naming", "counting")[n % 2], f"What is number {n}?", str(n)) for n in range(10)]
    (root / "unseen.json").write_text(json.dumps(unseen_records()))
    (root / "heldout.json").write_text(json.dumps(seen))
    return DataConfig(
        name="json",
        source="json",
        unseen=str(root / "unseen.json"),
        heldout=str(root / "heldout.json"),
        images=str(root / "images"),
    )


@pytest.fixture
def config(data: DataConfig, tmp_path: Path) -> EvalConfig:
    """The untuned tiny model on everything."""
    return EvalConfig(
        model=TINY,
        adapter=AdapterConfig(name="none"),
        routing=RoutingConfig(name="instance"),
        data=data,
        eval=GenerationConfig(batch_size=8, max_new_tokens=4),
        output_dir=str(tmp_path / "out"),
    )
