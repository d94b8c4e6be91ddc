"""Stand-ins for the parts of LLaVA-v1, and a local copy of Vision-Flan in the exact layout of the hub."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixlora_cli.config import DataConfig, PrepareConfig, PrepareOptions

from .standins import Parts, make_parts

INSTRUCTION = "Identify the colour that fills the whole picture."
COLOURS = ("red", "green", "blue", "yellow")


def png(colour: str, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def record(task: str, number: int, question: str, answer: str, image: str | None) -> dict[str, Any]:
    """As in the annotation file: the marker follows the question, and ids repeat."""
    value = question if image is None else f"{question}\n<image>"
    raw: dict[str, Any] = {"id": f"{task}+id", "task_name": task, "image": image}
    raw["conversations"] = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    if image is None:
        del raw["image"]
    return raw


def vision_flan_records() -> list[dict[str, Any]]:
    """8 of CIFAR+colour (one instruction), 4 of VQA (no common beginning), 1 without a picture."""
    colour = [
        record("CIFAR+colour", n, f"{INSTRUCTION}\n\nHint {n}.", COLOURS[n % 4], f"CIFAR+colour_{n}.png")
        for n in range(8)
    ]
    starts = ("What is it?", "Is it red?", "Say the colour.", "Which colour?")
    vqa = [record("VQA", n, start, COLOURS[n], "CIFAR+colour_0.png") for n, start in enumerate(starts)]
    return [*colour, *vqa, record("text", 0, "Which colour has grass?", "green", None)]


MakeCopy = Callable[..., Path]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """To be read only."""
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def make_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeCopy:
    """Writes annotation, metadata and archive; `records` and more members may be given."""
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))

    def make(records: list[dict[str, Any]] | None = None, members: dict[str, bytes] | None = None) -> Path:
        folder = tmp_path / "copy"
        folder.mkdir(exist_ok=True)
        records = vision_flan_records() if records is None else records
        text = json.dumps(records)
        (folder / "annotation_191-task_1k.json").write_text(text)
        (folder / "metadata.json").write_text(text)  # as on the hub: the records once more
        pictures = {f"CIFAR+colour_{n}.png": png(COLOURS[n % 4], 16 + n) for n in range(8)}
        with zipfile.ZipFile(folder / "image_191-task_1k.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in (pictures | (members or {})).items():
                archive.writestr(f"images_191task_1k/{name}", content)
        return folder

    return make


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., PrepareConfig]:
    def make(
        source: Path | str, *, seed: int = 0, data: dict[str, Any] | None = None, **options: Any
    ) -> PrepareConfig:
        group = DataConfig(
            **{"name": "vision_flan", "source": "vision_flan", "root": str(tmp_path / "flan"), **(data or {})}
        )
        return PrepareConfig(
            data=group, prepare=PrepareOptions(vision_flan=str(source), **options), seed=seed
        )

    return make
