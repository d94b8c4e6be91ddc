"""Files of JSON lines that are appended to and may be killed at any byte: read line by line, one record at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from mixlora_cli.errors import UserError

T = TypeVar("T")


class JsonLines(Generic[T]):
    """The records of a file; `end` and `torn` are known once all were gone through."""

    def __init__(
        self, path: Path, read: Callable[[Any], T | None], what_to_do: str, only_cut: bool = False
    ) -> None:
        """Read `path`.

        Args:
            path: the file.
            read: a line's content -> its record, None for a line that is none. A ValueError, TypeError or KeyError
                that it raises says that the line cannot be read.
            what_to_do: end of the message about such a line, as in "move the file away and evaluate again".
            only_cut: leave out a last line only where its line end is missing, not where it cannot be read.
        """
        self.end = 0
        """Offset behind the last whole line."""
        self.torn = False
        """A last line was left out."""
        self._path, self._read, self._what_to_do, self._only_cut = path, read, what_to_do, only_cut

    def __iter__(self) -> Iterator[T]:
        """Raises UserError when a line that is not left out cannot be read."""
        with self._path.open("rb") as file:
            lines = iter(file)
            for number, line in enumerate(lines, start=1):
                whole = line.endswith(b"\n")
                try:
                    if not whole:
                        raise ValueError("no line end")
                    record = self._read(json.loads(line))
                except (ValueError, TypeError, KeyError) as error:
                    if next(lines, None) is None and not (whole and self._only_cut):
                        self.torn = True
                        return
                    raise UserError(
                        f"{self._path}, line {number} cannot be read: {self._what_to_do}"
                    ) from error
                self.end += len(line)
                if record is not None:
                    yield record
