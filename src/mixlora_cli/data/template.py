"""Turns, and the chat templates that turn them into the text that a model reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

IMAGE_MARKER = "<image>"
"""Where a picture stands in a turn's text, whatever the model's own token for it is."""

Role = Literal["system", "human", "gpt"]


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, without the template around it."""

    role: Role
    text: str


@dataclass(frozen=True)
class Segment:
    """A stretch of the conversation's text that carries loss as a whole (an answer and its end), or not at all."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class Template:
    """A chat template in Jinja, as transformers understands it."""

    name: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `{"enable_thinking": False}`."""
    bos: bool | None = None
    """Whether the tokenizer's begin-of-sequence token, if it has one, is put before the text; None = as the model's
    processor does."""
    pictures_first: bool = False
    """Whether all pictures open the first question, as LLaVA has it, wherever they stand."""


def _built_in(name: str, bos: bool, pictures_first: bool = True) -> Template:
    source = Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8")
    return Template(name, source, bos=bos, pictures_first=pictures_first)


V1 = _built_in("v1", bos=True)
SMOLLM = _built_in("smollm", bos=False)
ONEVISION = _built_in("onevision", bos=False, pictures_first=False)
TEMPLATES: dict[str, Template] = {template.name: template for template in (V1, SMOLLM, ONEVISION)}
CHOICES = f"model.chat_template={', '.join(TEMPLATES)} or a Jinja file"
"""What else than its own template a model can be given, for messages."""
