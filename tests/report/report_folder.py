"""What the tests of the report are made of."""

import random
from pathlib import Path
from typing import Any

from PIL import Image

from mixlora_cli.evaluation.predictions import Header, Prediction, open_predictions

COLOURS = ("red", "green", "blue")


def picture(path: Path, seed: int, side: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(side * side * 3)).save(path)


def prediction(index: int, benchmark: str, target: str, given: str, **more: Any) -> Prediction:
    fields = {"split": "unseen", "question": f"Question {index}?", "image": f"{index % 4}.png", **more}
    return Prediction(
        index=index, benchmark=benchmark, id=f"i{index}", target=target, prediction=given, **fields
    )


def write_folder(
    folder: Path,
    predictions: list[Prediction],
    images: Path | None,
    label: str = "LoRA r=4",
    limit: int | None = None,
    **more: Any,
) -> Path:
    names = {p.benchmark for p in predictions}
    about = {
        "label": label,
        "model": "tiny",
        "limit": limit,
        "seed": 0,
        "run": None,
        "images": {name: str(images) for name in names} if images else {},
        **more,
    }
    with open_predictions(
        folder / "predictions.jsonl", Header({"model": "m"}, len(predictions), about)
    ) as writer:
        writer.append(predictions)
    return folder
