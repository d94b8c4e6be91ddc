"""The file of one judge's replies: a cache keyed by the full request, appended and safe to kill at any byte.

`judgements/<judge>.jsonl` beside the predictions: a header that names the judge, then a line for each reply. What the
reply means is read from its text anew each time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mixlora_cli.evaluation.lines import JsonLines
from mixlora_cli.judging.identity import Identity

FORMAT = "mixlora-judgements/1"
FOLDER = "judgements"


@dataclass(frozen=True)
class Stored:
    """A file of replies as read: `end` is the offset behind its last whole line."""

    identity: Identity | None
    replies: Mapping[str, str]
    """Text of each reply by `Identity.key`."""
    end: int


class ReplyReader:
    """Goes through a file of replies line by line; holds one reply at a time.

    A key that was written twice comes twice: the first counts. A half-written last line is left out.
    """

    def __init__(self, path: Path) -> None:
        self.identity: Identity | None = None
        """Known once the first reply comes, or all are gone through; None where the header is not whole."""
        self._lines = JsonLines(path, self._read, "move the file away and judge again", only_cut=True)

    @property
    def end(self) -> int:
        """Offset behind the last whole line."""
        return self._lines.end

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Key and text.

        Raises UserError when a line that is not the last cannot be read, or the file is of another kind.
        """
        return iter(self._lines)

    def _read(self, content: Any) -> tuple[str, str] | None:
        if self.identity is None:
            self.identity = _identity(content)
            return None
        return str(content["key"]), str(content["reply"])


def read_replies(path: Path) -> Stored:
    """Read a whole file of replies into memory; see `ReplyReader`, which does not."""
    reader = ReplyReader(path)
    replies: dict[str, str] = {}
    for key, reply in reader:
        replies.setdefault(key, reply)
    return Stored(reader.identity, replies, reader.end)


def _identity(content: Any) -> Identity:
    if content["format"] != FORMAT:
        raise ValueError("format")
    return Identity(**content["judge"])


class ReplyWriter:
    """Appends replies; every `append` is on the disk when it returns."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def append(self, replies: Mapping[str, str]) -> None:
        """Write whole lines in one go and wait until the disk has them."""
        self._write([{"key": key, "reply": reply} for key, reply in replies.items()])

    def _write(self, records: list[dict[str, Any]]) -> None:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._file.write("".join(lines).encode(errors="replace"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> ReplyWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def open_replies(folder: Path, identity: Identity) -> tuple[ReplyWriter, Mapping[str, str]]:
    """Continue the judge's file in an evaluation folder, or start it: the writer, and the replies it has.

    Raises UserError when the file cannot be read.
    """
    path = folder / FOLDER / identity.file_name
    if path.exists():
        found = read_replies(path)
        if found.identity is not None:
            file = path.open("r+b")
            file.truncate(found.end)
            file.seek(found.end)
            return ReplyWriter(file), found.replies
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ReplyWriter(path.open("wb"))
    writer._write([{"format": FORMAT, "judge": asdict(identity)}])
    return writer, {}


def reply_files(folder: Path) -> list[Path]:
    """The files of all judges in an evaluation folder, by name."""
    return sorted((folder / FOLDER).glob("*.jsonl"))


def all_replies(folder: Path) -> list[Stored]:
    """What every judge has replied in an evaluation folder, by file name."""
    found = [read_replies(path) for path in reply_files(folder)]
    return [stored for stored in found if stored.identity is not None]
