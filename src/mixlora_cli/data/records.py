"""Read Vision-Flan / LLaVA annotation files and check every record's text and image path.

A record is `{"id", "task_name"?, "image"?, "conversations": [{"from": "human" | "gpt", "value": str}, ...]}`;
`"images": [path]` is read as `"image": path`, other keys are kept in `Record.extra`. A file is a JSON list of
records or JSON lines. Ids need not be unique: a record's place in its file names it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlora_cli.data.pictures import locate_picture
from mixlora_cli.data.problems import BadRecord, Kind, Problem
from mixlora_cli.data.template import IMAGE_MARKER, Turn
from mixlora_cli.data.text_files import lone_surrogate, numbered_lines, parse_json, read_text
from mixlora_cli.errors import UserError, cut

DEFAULT_TASK = "unnamed"
"""Task of a record without `task_name` (plain LLaVA files have none)."""

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
    image: Path | None
    """None for a text-only record."""
    conversation: tuple[Turn, ...]
    """human, gpt, human, gpt, ...; the image marker may stand anywhere in the first human turns, or nowhere.
    """
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_annotations(path: Path) -> tuple[list[tuple[int, Any]], list[Problem]]:
    """Every readable record of a file with its index, and the unreadable ones.

    A JSON list that breaks off yields the records before the break and one problem (`Kind.CUT_SHORT`); a
    broken line of JSON lines costs that line alone (`Kind.MALFORMED`).

    Raises UserError when the file is missing, is not UTF-8 text, or is neither a JSON list nor JSON lines.
    """
    text = read_text(path, "a JSON annotation file")
    opening = text.lstrip()[:1]
    if opening == "[":
        return _read_list(text, str(path))
    if opening == "{" and not _is_single_object(text):
        return _read_lines(text, str(path))
    raise UserError(f"{path}: expected a JSON list of records or JSON lines, one record a line")


def _is_single_object(text: str) -> bool:
    """Whether the text is one object over several lines (a metadata file, say): not a list of records."""
    first_line = text.lstrip().split("\n", 1)[0].strip()
    return first_line == "{"


def _read_list(text: str, source: str) -> tuple[list[tuple[int, Any]], list[Problem]]:
    try:
        return list(enumerate(parse_json(text, source))), []
    except json.JSONDecodeError:
        return _salvage_list(text)


def _salvage_list(text: str) -> tuple[list[tuple[int, Any]], list[Problem]]:
    """Records before the break, read one by one, and a problem that says where the break is."""
    decoder = json.JSONDecoder()
    records: list[tuple[int, Any]] = []
    position = _skip_space(text, text.index("[") + 1)
    while True:
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            reason, position = error.msg, error.pos
            break
        records.append((len(records), value))
        position = _skip_space(text, end)
        following = text[position : position + 1]
        if following != ",":
            reason = "Text after the end of the list" if following == "]" else "Expecting ',' or ']'"
            break
        position = _skip_space(text, position + 1)
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    where = f"line {line} column {column} (character {position} of {len(text)})"
    detail = f"{reason} at {where}, after {len(records)} whole records"
    return records, [Problem(len(records), Kind.CUT_SHORT, detail)]


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _read_lines(text: str, source: str) -> tuple[list[tuple[int, Any]], list[Problem]]:
    records: list[tuple[int, Any]] = []
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

    Raises BadRecord that says what is wrong.
    """
    if not isinstance(raw, dict):
        raise BadRecord(Kind.MALFORMED, f"expected an object, got {type(raw).__name__}")
    if lone_surrogate(raw):
        halves = {key: lone_surrogate([key, value]) for key, value in raw.items()}
        raise BadRecord(
            Kind.NOT_UNICODE, "; ".join(f"{half} in {cut(key)}" for key, half in halves.items() if half)
        )
    name = _image_name(raw)
    conversation = _parse_conversation(raw.get("conversations"), has_image=name is not None)
    return Record(
        index=index,
        id=str(raw.get("id", index)),
        task=task_name(raw),
        image=None if name is None else _locate_image(name, images),
        conversation=conversation,
        extra={key: value for key, value in raw.items() if key not in _FIELDS},
    )


def task_name(raw: Any) -> str:
    """Task of an unchecked record. Raises BadRecord when it is not a string."""
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


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, control and format characters, fillers."""
    return all(
        unicodedata.category(mark) in ("Cc", "Cf", "Zs", "Zl", "Zp") or _INVISIBLE.match(mark)
        for mark in text
    )


def _image_name(raw: Mapping[str, Any]) -> Any:
    """What a record gives as its picture, in `image` or as the one entry of `images`; None without one.

    Raises BadRecord for several pictures, and where the picture is under a key that is not read.
    """
    name, listed = raw.get("image"), raw.get("images")
    if listed is not None and listed != []:
        if not isinstance(listed, list) or listed == [None]:
            raise BadRecord(Kind.MALFORMED, f"images must be a list with one path, got {cut(repr(listed))}")
        if len(listed) > 1:
            raise BadRecord(Kind.MALFORMED, f"images has {len(listed)} pictures, a record may have one")
        if name is not None and name != listed[0]:
            raise BadRecord(Kind.MALFORMED, "image and images name two pictures, a record may have one")
        name = listed[0]
    if name is None:
        for key, value in raw.items():
            if key not in _FIELDS and value and isinstance(value, (str, list, dict)) and _is_picture_key(key):
                raise BadRecord(Kind.MALFORMED, f"no image, but {cut(key)}; the key is image")
    return name


def _is_picture_key(key: str) -> bool:
    return _PICTURE_WORDS.fullmatch(re.sub("[^a-z]", "", key.lower())) is not None


def _parse_conversation(raw: Any, *, has_image: bool) -> tuple[Turn, ...]:
    if not isinstance(raw, list) or not raw:
        raise BadRecord(Kind.MALFORMED, "conversations must be a non-empty list of {from, value}")
    turns: list[Turn] = []
    for number, item in enumerate(raw):
        role = item.get("from") if isinstance(item, dict) else None
        value = item.get("value") if isinstance(item, dict) else None
        expected = "human" if number % 2 == 0 else "gpt"
        if role != expected:
            raise BadRecord(Kind.MALFORMED, f"turn {number} must be from {expected!r}, got {cut(repr(role))}")
        if not isinstance(value, str):
            raise BadRecord(Kind.MALFORMED, f"turn {number} has no text in 'value'")
        turns.append(Turn("human" if number % 2 == 0 else "gpt", value))
    if len(turns) % 2:
        raise BadRecord(Kind.MALFORMED, "the conversation must end with an answer from 'gpt'")
    _check_texts(turns, has_image=has_image)
    return tuple(turns)


def _check_texts(turns: list[Turn], *, has_image: bool) -> None:
    """Answers and questions hold text, and the image marker appears at most once, in a question, if there is
    an image.
    """
    for number, turn in enumerate(turns):
        if turn.role == "gpt" and is_blank(turn.text):
            raise BadRecord(Kind.EMPTY_ANSWER, f"turn {number}")
        if turn.role == "gpt" and IMAGE_MARKER in turn.text:
            raise BadRecord(Kind.IMAGE_MARKER, f"{IMAGE_MARKER} in the answer of turn {number}")
        only_marker = has_image and number == 0 and IMAGE_MARKER in turn.text
        if turn.role == "human" and not only_marker and is_blank(turn.text.replace(IMAGE_MARKER, "")):
            raise BadRecord(Kind.MALFORMED, f"the question of turn {number} is empty")
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers > int(has_image):
        raise BadRecord(Kind.IMAGE_MARKER, f"{markers} {IMAGE_MARKER} for {int(has_image)} image")


def _locate_image(name: Any, images: Path | None) -> Path:
    """Path of an image that exists inside the image folder, links followed."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadRecord(Kind.MALFORMED, f"image must be one relative path, got {cut(repr(name))}")
    if name.startswith("data:") or len(name) > _LONGEST_PATH:
        detail = "the picture is in the record (base64); write it to a file and give its name"
        raise BadRecord(Kind.MALFORMED, f"{cut(name)}: {detail}")
    if images is None:
        raise BadRecord(Kind.MISSING_IMAGE, f"{cut(name)}: no image folder is set (data.images=<folder>)")
    return locate_picture(name, images)
