"""The forms in which people write a conversation, to one: turns, and what stands for a picture at each marker.

    {"conversations": [{"from": "human" | "gpt" | "system", "value": text}]}
    {"messages": [{"role": "user" | "assistant" | "system", "content": text or parts}]}
    {"texts": [{"user": text, "assistant": text}]}
    {"prompt": text, "completion": text}, and the other pairs of `PAIRS`

A part is `{"type": "text", "text": ...}` or `{"type": "image", ...}`, with the picture or standing for the next one of
the record's `images`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mixlora_cli.data.embedded import PICTURE_KEYS
from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.data.template import IMAGE_MARKER, Turn
from mixlora_cli.errors import cut

CONVERSATION_KEYS = ("conversations", "messages", "conversation")
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("query", "response"), ("question", "answer"))
"""Keys of a question and its answer, where a record has no conversation; `input` is put behind an `instruction`."""
NEXT = object()
"""Stands for the next picture that the record lists."""
_ROLES = {
    "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "model": "gpt", "system": "system",
}  # fmt: skip
_TOOLS = frozenset(
    {"tool", "function", "function_call", "observation", "tool_call", "tool_response", "ipython"}
)
_UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""Keys of a turn with something that would be lost."""
_TEXT, _PICTURE = ("text", "input_text"), ("image", "image_url", "input_image")


@dataclass(frozen=True)
class Conversation:
    """What one record says."""

    turns: tuple[Turn, ...]
    """A system turn or none, then human, gpt, human, gpt, ..."""
    pictures: tuple[Any, ...]
    """For each image marker, in order: the picture as the record gives it there, its number among those that the
    record lists, or `NEXT`."""
    keys: frozenset[str]
    """Keys of the record that were read."""


def read_conversation(raw: Mapping[str, Any]) -> Conversation:
    """Turns of a record in any of the forms.

    Raises:
        BadRecord: there is none, turns do not alternate, the last has no answer, or something in it is not read.
    """
    items, keys = _items(raw)
    if isinstance(raw.get("system"), str):  # beside the conversation, as others keep it
        items, keys = [{"from": "system", "value": raw["system"]}, *items], keys | {"system"}
    turns: list[Turn] = []
    pictures: list[Any] = []
    words: Mapping[str, str] = {"human": "human", "gpt": "gpt"}
    for number, item in enumerate(items):
        fields = item if isinstance(item, Mapping) else {}
        speaker, said = ("role", "content") if "role" in fields else ("from", "value")
        role = fields.get(speaker)
        lost = next((key for key in _UNREAD if fields.get(key)), None)
        if lost or (isinstance(role, str) and role in _TOOLS):
            what = f"has {lost}" if lost else f"is from {role!r}"
            raise _bad(
                f"turn {number} {what}: calls of tools and reasoning are not read; leave such records out"
            )
        if speaker == "role":
            words = {"human": "user", "gpt": "assistant"}
        asked = sum(turn.role != "system" for turn in turns)
        expected: Literal["system", "human", "gpt"] = "gpt" if asked % 2 else "human"
        if number == 0 and role == "system":
            expected = "system"
        elif not isinstance(role, str) or _ROLES.get(role) != expected:
            raise _bad(f"turn {number} must be from {words[expected]!r}, got {cut(repr(role))}")
        text, found = _text(fields.get(said), number, said)
        if expected == "system" and not text.strip():
            continue
        turns.append(Turn(expected, text))
        pictures += found
    if not turns or turns[-1].role != "gpt":
        raise _bad(f"the conversation must end with an answer from {words['gpt']!r}")
    return Conversation(tuple(turns), tuple(pictures), keys)


def _items(raw: Mapping[str, Any]) -> tuple[list[Any], frozenset[str]]:
    """Unchecked turns, and the keys that hold them."""
    given = [key for key in CONVERSATION_KEYS if raw.get(key) is not None]
    if len(given) > 1:
        raise _bad(f"{' and '.join(given)}: a record has one conversation")
    if given:
        items = raw[given[0]]
        if not isinstance(items, list) or not items:
            raise _bad(f"{given[0]} must be a non-empty list of {{from, value}} or {{role, content}}")
        return items, frozenset(given)
    if isinstance(raw.get("texts"), list):  # of The Cauldron and FineVision
        pairs = [each if isinstance(each, Mapping) else {} for each in raw["texts"]]
        said = ({"role": role, "content": pair.get(role)} for pair in pairs for role in ("user", "assistant"))
        return list(said), frozenset({"texts"})
    for asked, answered in PAIRS:
        question, answer = raw.get(asked), raw.get(answered)
        if isinstance(question, list) and isinstance(answer, list):
            return question + answer, frozenset({asked, answered})
        if isinstance(question, str) and isinstance(answer, str):
            if asked == "instruction" and raw.get("input"):
                question = f"{question}\n{raw['input']}"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return turns, frozenset({asked, answered} | ({"input"} if asked == "instruction" else set()))
    expected = ", ".join([*CONVERSATION_KEYS, "texts", *map(" + ".join, PAIRS)])
    there = ", ".join(map(cut, list(raw)[:10])) or "none"
    raise _bad(f"no conversation: expected {expected}; its keys are {there}")


def _text(said: Any, number: int, key: str) -> tuple[str, list[Any]]:
    """The text of a turn with a marker for each picture, and what the markers stand for."""
    if isinstance(said, str):
        return said, [NEXT] * said.count(IMAGE_MARKER)
    if not isinstance(said, list):
        raise _bad(f"turn {number} has no text in {key!r}")
    text, pictures = "", []
    for part in said:
        fields = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = fields.get("type") if isinstance(fields, Mapping) else None
        if kind in _TEXT and isinstance(fields.get("text"), str):
            text += fields["text"]
            pictures += [NEXT] * fields["text"].count(IMAGE_MARKER)
        elif kind in _PICTURE:
            text += IMAGE_MARKER
            given = any(fields.get(key) not in (None, "") for key in PICTURE_KEYS)
            pictures.append(fields if given else fields["index"] if fields.get("index") is not None else NEXT)
        else:
            raise _bad(f"turn {number} has a part of type {cut(repr(kind))}; text and image are read")
    return text, pictures


def _bad(detail: str) -> BadRecord:
    return BadRecord(Kind.MALFORMED, detail)
