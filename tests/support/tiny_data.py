"""Small data sets of JSON records with noise for pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mixlora_cli.config import DataConfig

ANSWERS = (("yes", "no"), ("no dog", "seven dogs"), ("red circle", "7"))
"""Of the first task, the second and so on: they want different things."""


def tiny_data(root: Path, remark: str = "", seed: int = 0, **splits: Sequence[str]) -> DataConfig:
    """Write records into `root`: `train=["counting", "reading"] * 8` gives eight of each of two tasks, in turn.

    Every seventh record has no picture, and every other picture is a copy of the one before, under a name of its own.
    Every task has a definition, and so has the task "trained alone", of which there is no record.

    Args:
        remark: stands at the end of the second record's question.
        seed: of questions and answers.
    """
    (root / "images").mkdir(parents=True)
    files = {}
    for split, tasks in splits.items():
        generator = random.Random(f"{split}{seed}")
        records: list[dict[str, Any]] = []
        for number, task in enumerate(tasks):
            words = " ".join(generator.choices(["red", "big", "dog", "left", "seven"], k=number % 5))
            question = f"What is it? {words}{remark if number == 1 else ''}"
            answer = generator.choice(ANSWERS[list(dict.fromkeys(tasks)).index(task) % len(ANSWERS)])
            record: dict[str, Any] = {
                "id": f"{split}-{number}",
                "task_name": task,
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
            }
            if split == "unseen":
                record["benchmark"] = task
            if number % 7:
                record["image"] = f"{split}{number}.png"
                noise = random.Random(f"{split}{number // 2}").randbytes(16 * 16 * 3)
                Image.frombytes("RGB", (16, 16), noise).save(root / "images" / record["image"])
            records.append(record)
        files[split] = str(root / f"{split}.json")
        Path(files[split]).write_text(json.dumps(records))
    names = {task for tasks in splits.values() for task in tasks} | {"trained alone"}
    metadata = root / "definitions.json"
    metadata.write_text(json.dumps({name: {"definition": f"Do {name}."} for name in sorted(names)}))
    return DataConfig(
        name="json", source="json", images=str(root / "images"), metadata=str(metadata), **files
    )


def as_arguments(data: DataConfig) -> list[str]:
    """The files of `tiny_data` as the command line names them."""
    keys = ("train", "heldout", "unseen", "images", "metadata")
    return ["data=json", *(f"data.{key}={path}" for key in keys if (path := getattr(data, key)))]


def settings_of(kind: Any, values: dict[str, Any], **defaults: Any) -> Any:
    """A configuration class made of those of `values` that it has, which are taken out, over `defaults`."""
    own = {key: values.pop(key) for key in [*values] if key in kind.__dataclass_fields__}
    return kind(**{**defaults, **own})
