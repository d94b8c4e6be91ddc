"""Read Vision-Flan / LLaVA annotation files and check every record's text and image path.

A record is `{"id", "task_name"?, "image"?, "conversations": [{"from": "human" | "gpt", "value": str}, ...]}`;
`"images": [path]` is read as `"image": path`, other keys are kept in `Record.extra`. A file is a JSON list of
records or JSON lines. Ids need not be unique: a record's place in its file names it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixlora_cli.data.images import Picture, locate_picture
from mixlora_cli.data.problems import BadRecord, Kind, Problem
from mixlora_cli.data.template import IMAGE_MARKER, Turn
from mixlora_cli.data.text_files import lone_surrogate, numbered_lines, parse_json, read_text
from mixlora_cli.errors import UserError, cut

DEFAULT_TASK = "unnamed"
"""Task of a record without `task_name` (plain LLaVA files have none)."""
Raw = tuple[int, Any]
"""An unchecked record with its index in the file."""

_FIELDS = frozenset({"id", "task_name", "image", "images", "conversations"})
_PICTURE_WORDS = re.compile(r"(image|img|picture|photo)s?(path|file|filename|name|url|uri)?s?")
"""Keys, without case and marks, under which others keep the picture: with one, no record is text-only."""
_LONGEST_PATH = 4096
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Characters that show nothing though their category is that of marks, letters or symbols."""


@dataclass(frozen=True)
class Record:
    """One checked instance."""

    index: int
    """Place in its file, from 0."""
    id: str
    task: str
    images: tuple[Picture, ...]
    """In the order of their markers; empty for a text-only record."""
    conversation: tuple[Turn, ...]
    """A system turn or none, then human, gpt, human, gpt, ...; the image marker may stand anywhere in a human turn, or
    nowhere."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of its pictures that are files: all of them, except in streaming."""
        return tuple(picture for picture in self.images if isinstance(picture, Path))


def read_annotations(path: Path) -> tuple[list[Raw], list[Problem]]:
    """Every readable record of a file with its index, and the unreadable ones.

    A JSON list that breaks off yields the records before the break and one problem (`Kind.CUT_SHORT`); a
    broken line of JSON lines costs that line alone (`Kind.MALFORMED`).

    Raises:
        UserError: the file is missing, is not UTF-8 text, or is neither a JSON list nor JSON lines.
    """
    text = read_text(path, "a JSON annotation file")
    beginning = text.lstrip()
    if beginning.startswith("["):
        try:
            return list(enumerate(parse_json(text, str(path)))), []
        except json.JSONDecodeError:
            return _salvage_list(text)
    # an object over several lines is no list of records but a metadata file, say
    if beginning.startswith("{") and beginning.split("\n", 1)[0].strip() != "{":
        return _read_lines(text)
    raise UserError(f"{path}: expected a JSON list of records or JSON lines, one record a line")


def _salvage_list(text: str) -> tuple[list[Raw], list[Problem]]:
    """Records before the break, read one by one, and a problem that says where the break is."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")

    def behind_space(position: int) -> int:
        match = space.match(text, position)
        return position if match is None else match.end()

    records: list[Raw] = []
    position = behind_space(text.index("[") + 1)
    while True:
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            reason, position = error.msg, error.pos
            break
        records.append((len(records), value))
        position = behind_space(end)
        following = text[position : position + 1]
        if following != ",":
            reason = "Text after the end of the list" if following == "]" else "Expecting ',' or ']'"
            break
        position = behind_space(position + 1)
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    where = f"line {line} column {column} (character {position} of {len(text)})"
    detail = f"{reason} at {where}, after {len(records)} whole records"
    return records, [Problem(len(records), Kind.CUT_SHORT, detail)]


def _read_lines(text: str) -> tuple[list[Raw], list[Problem]]:
    records: list[Raw] = []
    problems: list[Problem] = []
    for index, (number, line) in enumerate(numbered_lines(text)):
        try:
            records.append((index, parse_json(line, f"line {number}")))
        except json.JSONDecodeError as error:
            detail = f"line {number} is not JSON: {error.msg} at column {error.colno}"
            problems.append(Problem(index, Kind.MALFORMED, detail))
        except UserError as error:
            problems.append(Problem(index, Kind.MALFORMED, str(error)))
    return records, problems


def parse_record(index: int, raw: Any, images: Path | None) -> Record:
    """Check one record's fields, turns and image path (the picture itself is opened later).

    `images` is the folder that image paths are relative to, already resolved; it may lie in a zip archive.

    Raises:
        BadRecord: something is wrong with it.
    """
    if not isinstance(raw, dict):
        raise BadRecord(Kind.MALFORMED, f"expected an object, got {type(raw).__name__}")
    if lone_surrogate(raw):
        halves = {key: lone_surrogate([key, value]) for key, value in raw.items()}
        told = [f"{half} in {cut(key)}" for key, half in halves.items() if half]
        raise BadRecord(Kind.NOT_UNICODE, "; ".join(told))
    name = _image_name(raw)
    conversation = _parse_conversation(raw.get("conversations"))
    _check_texts(conversation, has_image=name is not None)
    return Record(
        index=index,
        id=str(raw.get("id", index)),
        task=task_name(raw),
        images=() if name is None else (_locate_image(name, images),),
        conversation=conversation,
        extra={key: value for key, value in raw.items() if key not in _FIELDS},
    )


def task_name(raw: Any) -> str:
    """Task of an unchecked record.

    Raises:
        BadRecord: it is not a string.
    """
    task = raw.get("task_name") if isinstance(raw, dict) else None
    if task is None:
        return DEFAULT_TASK
    if not isinstance(task, str) or not task:
        raise BadRecord(Kind.MALFORMED, f"task_name must be a non-empty string, got {cut(repr(task))}")
    if found := lone_surrogate(task):
        raise BadRecord(Kind.NOT_UNICODE, f"{found} in task_name")
    return task


def names_picture(raw: Any) -> bool:
    """Whether an unchecked record is one about a picture."""
    return isinstance(raw, dict) and (raw.get("image") is not None or bool(raw.get("images")))


def _image_name(raw: Mapping[str, Any]) -> Any:
    """What a record gives as its picture, in `image` or as the one entry of `images`; None without one.

    Raises:
        BadRecord: there are several pictures, or the picture is under a key that is not read.
    """
    name, listed = raw.get("image"), raw.get("images")
    if listed is not None and listed != []:
        if not isinstance(listed, list) or listed == [None]:
            raise BadRecord(Kind.MALFORMED, f"images must be a list with one path, got {cut(repr(listed))}")
        if len(listed) > 1:
            raise BadRecord(Kind.MALFORMED, f"images has {len(listed)} pictures, a record may have one")
        if name is not None and name != listed[0]:
            raise BadRecord(Kind.MALFORMED, "image and images name two pictures, a record may have one")
        return listed[0]
    if name is None:
        for key, value in raw.items():
            is_picture_key = _PICTURE_WORDS.fullmatch(re.sub("[^a-z]", "", key.lower()))
            if key not in _FIELDS and is_picture_key and value and isinstance(value, (str, list, dict)):
                raise BadRecord(Kind.MALFORMED, f"no image, but {cut(key)}; the key is image")
    return name


def _parse_conversation(raw: Any) -> tuple[Turn, ...]:
    if not isinstance(raw, list) or not raw:
        raise BadRecord(Kind.MALFORMED, "conversations must be a non-empty list of {from, value}")
    turns: list[Turn] = []
    for number, item in enumerate(raw):
        fields = item if isinstance(item, dict) else {}
        role, value = fields.get("from"), fields.get("value")
        expected: Literal["human", "gpt"] = "gpt" if number % 2 else "human"
        if role != expected:
            raise BadRecord(Kind.MALFORMED, f"turn {number} must be from {expected!r}, got {cut(repr(role))}")
        if not isinstance(value, str):
            raise BadRecord(Kind.MALFORMED, f"turn {number} has no text in 'value'")
        turns.append(Turn(expected, value))
    if len(turns) % 2:
        raise BadRecord(Kind.MALFORMED, "the conversation must end with an answer from 'gpt'")
    return tuple(turns)


def _check_texts(turns: Sequence[Turn], *, has_image: bool) -> None:
    """Turns hold text, and the image marker appears at most once, in a question, if there is an image."""
    for number, turn in enumerate(turns):
        marked = IMAGE_MARKER in turn.text
        if turn.role == "gpt":
            if _is_blank(turn.text):
                raise BadRecord(Kind.EMPTY_ANSWER, f"turn {number}")
            if marked:
                raise BadRecord(Kind.IMAGE_MARKER, f"{IMAGE_MARKER} in the answer of turn {number}")
        elif not (has_image and number == 0 and marked) and _is_blank(turn.text.replace(IMAGE_MARKER, "")):
            raise BadRecord(Kind.MALFORMED, f"the question of turn {number} is empty")
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers > int(has_image):
        raise BadRecord(Kind.IMAGE_MARKER, f"{markers} {IMAGE_MARKER} for {int(has_image)} image")


def _is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, control and format characters, fillers."""
    return all(
        unicodedata.category(mark) in ("Cc", "Cf", "Zs", "Zl", "Zp") or _INVISIBLE.match(mark)
        for mark in text
    )


def _locate_image(name: Any, images: Path | None) -> Path:
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadRecord(Kind.MALFORMED, f"image must be one relative path, got {cut(repr(name))}")
    if name.startswith("data:") or len(name) > _LONGEST_PATH:
        detail = "the picture is in the record (base64); write it to a file and give its name"
        raise BadRecord(Kind.MALFORMED, f"{cut(name)}: {detail}")
    if images is None:
        raise BadRecord(Kind.MISSING_IMAGE, f"{cut(name)}: no image folder is set (data.images=<folder>)")
    return locate_picture(name, images)
