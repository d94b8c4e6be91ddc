"""Is the base good enough? It captions held-out pictures, and the names of objects in them are looked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mixlora_cli.alignment.pictures import ANNOTATION, IMAGES, write_pictures
from mixlora_cli.config.schema import DataConfig
from mixlora_cli.data.batches import encode_prompts
from mixlora_cli.data.collate import PixelLoader
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.mini.captions import Captioned, plural
from mixlora_cli.evaluation.generate import Generator
from mixlora_cli.models.base import Base

_BATCH = 20


@dataclass(frozen=True)
class CaptionCheck:
    """Names of objects in held-out pictures that the caption contains."""

    names: int
    names_right: int
    share: float
    examples: list[tuple[str, str]]
    """(written caption, generated caption) of the first pictures."""


def count_names(names: tuple[str, ...], caption: str) -> int:
    """How many of the names occur in a caption as whole words, singular or plural; each occurrence is used once."""
    rest = caption.lower()
    found = 0
    for name in names:
        pattern = rf"\b(?:{re.escape(name)}|{re.escape(plural(name))})\b"
        rest, hits = re.subn(pattern, "", rest, count=1)
        found += hits
    return found


def check_captions(base: Base, pictures: list[Captioned], folder: Path) -> CaptionCheck:
    """Caption every picture greedily; `folder` keeps the pictures."""
    write_pictures(folder, pictures)
    data = DataConfig(
        name="captions", source="json", heldout=str(folder / ANNOTATION), images=str(folder / IMAGES)
    )
    items = encode_prompts(load_records(data, "heldout"), base).items
    answer = Generator(base.model, base, PixelLoader(base.image_processor), max_new_tokens=40)
    captions = [
        text for start in range(0, len(items), _BATCH) for text in answer(items[start : start + _BATCH])
    ]
    # Several of one kind ("three cats") count as one name.
    wanted = [tuple(dict.fromkeys(picture.names)) for picture in pictures]
    total = sum(len(names) for names in wanted)
    right = sum(count_names(names, caption) for names, caption in zip(wanted, captions, strict=True))
    examples = [(picture.caption, caption) for picture, caption in zip(pictures, captions, strict=True)][:20]
    return CaptionCheck(total, right, right / max(total, 1), examples)
