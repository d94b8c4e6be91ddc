"""Is the base good enough? It captions held-out pictures, and is asked about them where it was taught to answer."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mixlora_cli.alignment.pictures import ANNOTATION, IMAGES, asked_first, write_pictures
from mixlora_cli.config import DataConfig
from mixlora_cli.data.collate import PixelLoader
from mixlora_cli.data.encode import encode_prompts
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.mini.captions import Captioned, plural
from mixlora_cli.evaluation.generate import Generator
from mixlora_cli.models.load import Base

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


@dataclass(frozen=True)
class QuestionCheck:
    """Short questions about held-out pictures: how many of each kind, and how many answers are exactly right."""

    asked: dict[str, int]
    right: dict[str, int]
    examples: list[tuple[str, str, str]]
    """(question, right answer, generated answer) of the first ones."""


def check_captions(base: Base, pictures: list[Captioned], folder: Path) -> CaptionCheck:
    """Caption every picture greedily; `folder` keeps the pictures."""
    write_pictures(folder, pictures)
    captions = _generated(base, folder, max_new_tokens=40)
    # Several of one kind ("three cats") count as one name.
    wanted = [tuple(dict.fromkeys(picture.names)) for picture in pictures]
    total = sum(len(names) for names in wanted)
    right = sum(count_names(names, caption) for names, caption in zip(wanted, captions, strict=True))
    examples = [(picture.caption, caption) for picture, caption in zip(pictures, captions, strict=True)][:20]
    return CaptionCheck(total, right, right / max(total, 1), examples)


def check_questions(base: Base, pictures: list[Captioned], folder: Path) -> QuestionCheck:
    """Ask one question about every picture, each in a conversation of its own; `folder` keeps the pictures."""
    write_pictures(folder, pictures, questions=1, captioned_share=0)
    questions = [asked_first(number, picture) for number, picture in enumerate(pictures)]
    answers = _generated(base, folder, max_new_tokens=12)
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    examples = []
    for question, answer in zip(questions, answers, strict=True):
        if question is None:
            continue
        asked[question.kind] += 1
        right[question.kind] += answer.strip() == question.answer
        examples.append((question.text, question.answer, answer))
    return QuestionCheck(dict(asked), dict(right), examples[:40])


def _generated(base: Base, folder: Path, max_new_tokens: int) -> list[str]:
    """What the base says, greedily, to the last question about each picture of a folder."""
    data = DataConfig(
        name="captions", source="json", heldout=str(folder / ANNOTATION), images=str(folder / IMAGES)
    )
    items = encode_prompts(load_records(data, "heldout"), base).items
    answer = Generator(base.model, base, PixelLoader(base.image_processor), max_new_tokens=max_new_tokens)
    return [text for start in range(0, len(items), _BATCH) for text in answer(items[start : start + _BATCH])]
