"""Records that cannot be used: counted together by kind, shown with examples, then refused or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixlora_cli.errors import UserError


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


def count_by_kind(problems: Sequence[Problem]) -> dict[Kind, int]:
    """Number of problems of each kind, in the order of `Kind`."""
    counts = Counter(problem.kind for problem in problems)
    return {kind: counts[kind] for kind in Kind if counts[kind]}


def summary(problems: Sequence[Problem], source: str) -> str:
    """One line: "3 bad records in train.json: 2 missing image (first: record 5, cat.png), 1 ...".

    Details come from the data, so line breaks in them are shown as spaces.
    """
    parts = []
    for kind, count in count_by_kind(problems).items():
        first = next(problem for problem in problems if problem.kind is kind)
        detail = " ".join(first.detail.split())
        parts.append(f"{count} {kind.value} ({'first: ' if count > 1 else ''}record {first.index}, {detail})")
    noun = "record" if len(problems) == 1 else "records"
    return f"{len(problems)} bad {noun} in {source}: {', '.join(parts)}"


def problem_table(problems: Sequence[Problem], source: str, examples: int = 3) -> Table:
    """A row for each kind: how many, and the first `examples` of them."""
    table = Table(title=f"Bad records in {escape(source)}", title_justify="left")
    table.add_column("problem")
    table.add_column("records", justify="right")
    table.add_column("first examples", overflow="fold")
    for kind, count in count_by_kind(problems).items():
        first = [problem for problem in problems if problem.kind is kind][:examples]
        lines = "\n".join(f"record {problem.index}: {problem.detail}" for problem in first)
        table.add_row(escape(kind.value), str(count), escape(lines))
    return table


def settle(problems: Sequence[Problem], source: str, total: int, on_error: Literal["stop", "skip"]) -> None:
    """Show all problems together, then stop or go on: nothing is dropped without being counted and reported.

    Raises UserError when there is a problem and `on_error` is "stop".
    """
    if not problems:
        return
    ordered = sorted(problems, key=lambda problem: problem.index)
    console = Console(stderr=True)
    if len(ordered) > 1:
        console.print(problem_table(ordered, source))
    if on_error == "stop":
        raise UserError(
            f"{summary(ordered, source)}; fix them or pass data.on_error=skip to go on without them"
        )
    message = f"left out {len(ordered)} of {total} records; {summary(ordered, source)}"
    console.print(message, markup=False, highlight=False, soft_wrap=True)
