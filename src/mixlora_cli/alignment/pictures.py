"""The caption pictures of stage one, as ordinary training data: LLaVA-format JSON and a folder of images."""

from __future__ import annotations

import json
import random
from pathlib import Path

from rich.console import Console
from rich.progress import track

from mixlora_cli.alignment.questions import Asked, ask
from mixlora_cli.data.mini.canvas import render
from mixlora_cli.data.mini.captions import PROMPTS, Captioned, captioned

ANNOTATION = "train.json"
IMAGES = "images"


def draw(count: int, stream: str) -> list[Captioned]:
    """The first `count` captioned scenes of a named random stream."""
    return [captioned(random.Random(f"{stream}/{number}")) for number in range(count)]


def write_pictures(
    root: Path, pictures: list[Captioned], questions: int = 0, captioned_share: float = 1 / 3
) -> list[Path]:
    """Write the pictures and their annotation under `root`; what is already there is kept.

    With `questions`, each picture is asked about in as many turns; `captioned_share` of them are captioned last.

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
            "conversations": _conversation(number, picture, questions, captioned_share),
        }
        for number, (picture, path) in enumerate(zip(pictures, paths, strict=True))
    ]
    (root / ANNOTATION).write_text(json.dumps(records))
    return paths


def asked_first(number: int, picture: Captioned) -> Asked | None:
    """The question with which the conversation about a picture begins; none fits some pictures."""
    return next(iter(ask(_questioner(number, picture), picture.scene, 1)), None)


def _questioner(number: int, picture: Captioned) -> random.Random:
    return random.Random(f"questions/{number}/{picture.caption}")


def _conversation(
    number: int, picture: Captioned, questions: int, captioned_share: float
) -> list[dict[str, str]]:
    """Turns of LLaVA's format: the questions, and last, in a share of the pictures, the caption."""
    rng = _questioner(number, picture)
    turns = [(asked.text, asked.answer) for asked in ask(rng, picture.scene, questions)]
    if not turns or rng.random() < captioned_share:
        turns.append((PROMPTS[number % len(PROMPTS)], picture.caption))
    conversation = []
    for position, (question, answer) in enumerate(turns):
        conversation.append({"from": "human", "value": f"<image>\n{question}" if position == 0 else question})
        conversation.append({"from": "gpt", "value": answer})
    return conversation
