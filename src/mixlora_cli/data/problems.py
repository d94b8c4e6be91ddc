"""Records that cannot be used: counted together by kind, shown with examples, then refused or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from rich.console import Console

from mixlora_cli.errors import UserError
from mixlora_cli.progress import say
from mixlora_cli.tables import Table, show


class Kind(Enum):
    """Why a record cannot be used; the value is the text that the user reads."""

    CUT_SHORT = "broken JSON, nothing read after it"
    MALFORMED = "malformed record"
    EMPTY_ANSWER = "empty answer"
    IMAGE_MARKER = "misplaced <image>"
    ESCAPING_IMAGE = "image path outside the image folder"
    MISSING_IMAGE = "missing image"
    CORRUPT_IMAGE = "corrupt image"
    HUGE_IMAGE = "absurdly large image"
    UNKNOWN_RANGE = "image whose brightness has no known range"
    NOT_UNICODE = "text that is no Unicode"
    CONTROL_TEXT = "control token in the text"
    NO_LABEL = "no answer token left after truncation"


class BadRecord(Exception):
    """Raised by a check on one record; whoever loops over the records turns it into a `Problem`."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(f"{kind.value}: {detail}")
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Problem:
    """One bad record. `index` counts from 0 in the file that it came from."""

    index: int
    kind: Kind
    detail: str


def settle(problems: Sequence[Problem], source: str, total: int, on_error: Literal["stop", "skip"]) -> None:
    """Show all problems together, then stop or go on: nothing is dropped without being counted and reported.

    Raises:
        UserError: there is a problem and `on_error` is "stop".
    """
    if not problems:
        return
    ordered = sorted(problems, key=lambda problem: problem.index)
    parts, rows = [], []
    for kind in Kind:
        # details come from the data: line breaks in them are shown as spaces
        found = [(each.index, " ".join(each.detail.split())) for each in ordered if each.kind is kind]
        if found:
            first = "first: " if len(found) > 1 else ""
            parts.append(f"{len(found)} {kind.value} ({first}record {found[0][0]}, {found[0][1]})")
            examples = "\n".join(f"record {index}: {detail}" for index, detail in found[:3])
            rows.append((kind.value, f"{len(found):7,}", examples))
    noun = "record" if len(ordered) == 1 else "records"
    summary = f"{len(ordered)} bad {noun} in {source}: {', '.join(parts)}"
    if len(ordered) > 1:
        headings = ("problem", "records", "first examples")
        show(Table(f"Bad records in {source}", headings, tuple(rows), num_labels=3), Console(stderr=True))
    if on_error == "stop":
        raise UserError(f"{summary}; fix them or pass data.on_error=skip to go on without them")
    say(f"left out {len(ordered)} of {total} records; {summary}")
