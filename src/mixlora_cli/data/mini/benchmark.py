"""An unseen benchmark as data: its question, and how picture number k and its questions are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from mixlora_cli.data.mini.canvas import Scene
from mixlora_cli.data.mini.digits import Digit

Picture = Scene | Digit


@dataclass(frozen=True)
class Question:
    """One question about a picture."""

    text: str
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the record that scoring reads: `category`, `answers`, `labels`."""


@dataclass(frozen=True)
class Benchmark:
    """One unseen benchmark, the counterpart of a column of the paper's tables."""

    name: str
    definition: str
    templates: tuple[str, ...]
    """Every question is one of these with its `{blanks}` filled."""
    num_pictures: int
    picture: Callable[[Random, int], tuple[Picture, list[Question]]]
    """(random numbers, k) -> picture number k and its questions; k balances labels and categories."""
    pairs: bool = False
    """Whether a picture has several questions that are scored together: records then carry `image_id`."""
