"""One record: checked text and pictures, whatever form it was written in.

A record is `{"id"?, "task_name"?, "image" or "images"?, <a conversation>}`; the forms of a conversation are those of
`data.conversations`, those of a picture those of `data.embedded`. Other keys are kept in `Record.extra`. Ids need not
be unique: a record's place in its file names it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlora_cli.data.conversations import NEXT, read_conversation
from mixlora_cli.data.embedded import picture_from
from mixlora_cli.data.images import Picture
from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.data.template import IMAGE_MARKER, Turn
from mixlora_cli.data.text_files import lone_surrogate
from mixlora_cli.errors import cut

DEFAULT_TASK = "unnamed"
"""Task of a record without `task_name` (plain LLaVA files have none)."""
_FIELDS = frozenset({"id", "task_name", "image", "images"})
_PICTURE_WORDS = re.compile(r"(image|img|picture|photo)s?(path|file|filename|name|url|uri)?s?")
"""Keys, without case and marks, under which others keep the picture: with one, no record is text-only."""
_OTHER_MEDIA = re.compile(r"(video|audio|sound)s?(path|file|filename|name|url|uri)?s?")
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Characters that show nothing though their category is that of marks, letters or symbols."""


@dataclass(frozen=True)
class Record:
    """One checked instance."""

    index: int
    """Place in its file, from 0; of several files, as if they were one behind the other."""
    id: str
    task: str
    images: tuple[Picture, ...]
    """In the order of their markers; empty for a text-only record."""
    conversation: tuple[Turn, ...]
    """A system turn or none, then human, gpt, human, gpt, ...; the questions have as many image markers as there are
    pictures, each where its picture stands."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    num_added: int = 0
    """Markers in front of the first question that the data does not have: its pictures had no place."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of its pictures that are files: all of them, except in streaming."""
        return tuple(picture for picture in self.images if isinstance(picture, Path))


def parse_record(
    index: int,
    raw: Any,
    images: Path | None,
    task: str | None = None,
    task_key: str | None = None,
    store: Path | None = None,
) -> Record:
    """Check one record's fields, turns and image paths (the pictures themselves are opened later).

    Args:
        index: `Record.index`.
        raw: the decoded record.
        images: the folder that image paths are relative to, already resolved; it may lie in a zip archive.
        task, task_key: see `task_of`.
        store: see `data.embedded.picture_from`.

    Raises:
        BadRecord: something is wrong with it.
    """
    if not isinstance(raw, dict):
        raise BadRecord(Kind.MALFORMED, f"expected an object, got {type(raw).__name__}")
    if lone_surrogate(raw):
        halves = {key: lone_surrogate([key, value]) for key, value in raw.items()}
        told = [f"{half} in {cut(key)}" for key, half in halves.items() if half]
        raise BadRecord(Kind.NOT_UNICODE, "; ".join(told))
    listed = _listed(raw)
    said = read_conversation(raw)
    read = _FIELDS | said.keys
    if not listed and all(isinstance(place, int) or place is NEXT for place in said.pictures):
        _refuse_other_keys(raw, read)
    _check_texts(said.turns)
    values = _placed(said.pictures, listed)
    added = 0 if said.pictures else len(values)
    return Record(
        index=index,
        id=str(index if raw.get("id") is None else raw["id"]),
        task=task_of(raw, task, task_key),
        images=tuple(picture_from(value, images, store) for value in values),
        conversation=_marked(said.turns, added),
        extra={key: value for key, value in raw.items() if key not in read and not _holds_bytes(value)},
        num_added=added,
    )


def task_of(raw: Any, task: str | None = None, task_key: str | None = None) -> str:
    """Task of an unchecked record.

    Args:
        raw: the decoded record.
        task: that of its whole file, where the file has one.
        task_key: key that names it in every record, before `task`; with dots, a key in an object.

    Raises:
        BadRecord: it is not a string, or not there under `task_key`.
    """
    if task_key is None and task is not None:
        return task
    value = raw.get(task_key or "task_name") if isinstance(raw, dict) else None
    if value is None and task_key is None:
        return DEFAULT_TASK
    if value is None:
        value = raw
        for part in str(task_key).split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            keys = ", ".join(map(cut, list(raw)[:20])) if isinstance(raw, dict) else "none"
            detail = f"no {cut(task_key)}, which data.task_key names; its keys are {keys}"
            raise BadRecord(Kind.MALFORMED, detail)
    if task_key is not None and type(value) is int:
        value = str(value)
    name = task_key or "task_name"
    if not isinstance(value, str) or not value:
        raise BadRecord(Kind.MALFORMED, f"{name} must be a non-empty string, got {cut(repr(value))}")
    if found := lone_surrogate(value):
        raise BadRecord(Kind.NOT_UNICODE, f"{found} in {name}")
    return value


def _listed(raw: Mapping[str, Any]) -> list[Any]:
    """What a record gives as its pictures, in `image` or `images`, which may say the same twice."""
    image, images = (
        [] if value is None else value if isinstance(value, list) else [value]
        for value in (raw.get("image"), raw.get("images"))
    )
    if image and images and image != images:
        raise BadRecord(Kind.MALFORMED, "image and images name different pictures; give one of the keys")
    return image or images


def _refuse_other_keys(raw: Mapping[str, Any], read: frozenset[str]) -> None:
    """Raise BadRecord where a record without a picture has one under a key that is not read."""
    for key, value in raw.items():
        if key in read or not value or not isinstance(value, (str, list, dict, bytes)):
            continue
        word = re.sub("[^a-z]", "", key.lower())
        if _PICTURE_WORDS.fullmatch(word):
            raise BadRecord(Kind.MALFORMED, f"no image, but {cut(key)}; the key is image")
        if _OTHER_MEDIA.fullmatch(word):
            raise BadRecord(Kind.MALFORMED, f"{cut(key)} is not read, only text and pictures are")


def _check_texts(turns: Sequence[Turn]) -> None:
    """Turns hold text, and image markers stand in questions alone."""
    for number, turn in enumerate(turns):
        marked = IMAGE_MARKER in turn.text
        if turn.role == "gpt" and _is_blank(turn.text):
            raise BadRecord(Kind.EMPTY_ANSWER, f"turn {number}")
        if turn.role != "human" and marked:
            part = "answer" if turn.role == "gpt" else "system text"
            raise BadRecord(Kind.IMAGE_MARKER, f"{IMAGE_MARKER} in the {part} of turn {number}")
        if not marked and _is_blank(turn.text):
            raise BadRecord(Kind.MALFORMED, f"the question of turn {number} is empty")


def _placed(places: Sequence[Any], listed: Sequence[Any]) -> list[Any]:
    """The pictures in the order of their markers; those of a record without any marker as they are listed."""
    given = [place for place in places if place is not NEXT and not isinstance(place, int)]
    if not places or (len(given) == len(places) and given == listed):
        return [*listed]
    if len(places) != len(given) + len(listed):
        count = len(given) + len(listed)
        noun = "image" if count < 2 else "images"
        raise BadRecord(Kind.IMAGE_MARKER, f"{len(places)} {IMAGE_MARKER} for {count} {noun}")
    values, waiting = [], iter(enumerate(listed))
    for place in places:
        if place is NEXT or isinstance(place, int):
            number, value = next(waiting)
            if place is not NEXT and place != number:
                detail = f"a part with index {place} stands where picture {number} is due"
                raise BadRecord(
                    Kind.IMAGE_MARKER, f"{detail}; list the pictures in the order of their places"
                )
            values.append(value)
        else:
            values.append(place)
    return values


def _marked(turns: Sequence[Turn], added: int) -> tuple[Turn, ...]:
    """The turns with this many markers more in front of the first question."""
    first = next(number for number, turn in enumerate(turns) if turn.role == "human")
    question = Turn("human", f"{IMAGE_MARKER}\n" * added + turns[first].text)
    return (*turns[:first], question, *turns[first + 1 :])


def _holds_bytes(value: Any) -> bool:
    """Whether a value is, or has in it, what no text file could hold: another picture, say."""
    if isinstance(value, (list, dict)):
        return any(map(_holds_bytes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes)


def _is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, control and format characters, fillers."""
    return all(
        unicodedata.category(mark) in ("Cc", "Cf", "Zs", "Zl", "Zp") or _INVISIBLE.match(mark)
        for mark in text
    )
