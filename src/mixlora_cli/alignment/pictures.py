"""The caption pictures of stage one, as ordinary training data: LLaVA-format JSON and a folder of images."""

from __future__ import annotations

import json
import random
from pathlib import Path

from rich.console import Console
from rich.progress import track

from mixlora_cli.data.mini.canvas import render
from mixlora_cli.data.mini.captions import PROMPTS, Captioned, captioned

ANNOTATION = "train.json"
IMAGES = "images"


def draw(count: int, stream: str) -> list[Captioned]:
    """The first `count` captioned scenes of a named random stream."""
    return [captioned(random.Random(f"{stream}/{number}")) for number in range(count)]


def write_pictures(root: Path, pictures: list[Captioned]) -> list[Path]:
    """Write the pictures and their annotation under `root`; what is already there is kept.

    Returns:
        The picture files, in order.
    """
    paths = [root / IMAGES / f"{number // 1000:03d}" / f"{number:06d}.png" for number in range(len(pictures))]
    for picture, path in track(
        list(zip(pictures, paths, strict=True)), description="drawing pictures", console=Console(stderr=True)
    ):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            render(picture.scene).save(partial, format="PNG", compress_level=1)
            partial.replace(path)
    records = [
        {
            "id": f"caption-{number}",
            "task_name": "caption",
            "image": str(path.relative_to(root / IMAGES)),
            "conversations": [
                {"from": "human", "value": f"<image>\n{PROMPTS[number % len(PROMPTS)]}"},
                {"from": "gpt", "value": picture.caption},
            ],
        }
        for number, (picture, path) in enumerate(zip(pictures, paths, strict=True))
    ]
    (root / ANNOTATION).write_text(json.dumps(records))
    return paths
