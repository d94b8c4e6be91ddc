"""What one case measured, and the file that keeps it: a line of JSON for each finished case.

`measurements.jsonl` begins with a line `{"format", "fingerprint": {...}}` that says what the numbers depend on beside
their case: machine, versions, the code that is measured. A file with another fingerprint is moved aside.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mixlora_cli.config import Part
from mixlora_cli.errors import UserError

FORMAT = "mixlora-bench-measurements/1"
FILE_NAME = "measurements.jsonl"

Value = str | int | float


@dataclass(frozen=True)
class Measurement:
    """One finished case."""

    part: Part
    case: Mapping[str, Value]
    """What was asked: shape, number format, batch, rounds, ..."""
    seconds: Mapping[str, list[float]] = field(default_factory=dict)
    """By variant, one number for each counted round."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By variant: operations, bytes, or whatever else does not vary."""

    @property
    def key(self) -> str:
        """What identifies the case within the file."""
        return case_key(self.part, self.case)


def case_key(part: Part, case: Mapping[str, Value]) -> str:
    """The part and everything that the case is made of."""
    return json.dumps([part, dict(case)], sort_keys=True)


class Journal:
    """The finished cases of an output folder."""

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, Value], announce: Callable[[str], None]
    ) -> None:
        """Read what is there; a file that tells of another machine or other code is moved aside and `announce`d.

        Raises:
            UserError: the folder cannot be written, or the file is not one of ours.
        """
        self.path = folder / FILE_NAME
        self._fingerprint = dict(fingerprint)
        self.done: dict[str, Measurement] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                self._read(announce)
            if not self.path.is_file():
                self._write_line({"format": FORMAT, "fingerprint": self._fingerprint})
        except OSError as error:
            raise UserError(
                f"output_dir={folder}: cannot be written ({error.strerror or error}); give another folder"
            ) from error

    def append(self, measurement: Measurement) -> None:
        """Keep one finished case; it is on the disk when this returns."""
        self.done[measurement.key] = measurement
        self._write_line(asdict(measurement))

    def _write_line(self, content: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(content) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self, announce: Callable[[str], None]) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole, newline, torn = text.rpartition("\n")
        lines = whole.splitlines() if newline else []
        if torn:  # killed while it wrote a line
            self.path.write_text(whole + newline, encoding="utf-8")
        if not lines:
            self.path.unlink()
            return
        header = self._header(lines[0])
        changed = [
            name
            for name in dict.fromkeys([*header, *self._fingerprint])
            if header.get(name) != self._fingerprint.get(name)
        ]
        if changed:
            aside = move_aside(self.path)
            announce(
                f"{', '.join(changed)} changed since {self.path} was written: measuring anew, the old file is {aside}"
            )
            return
        for line in lines[1:]:
            measurement = Measurement(**json.loads(line))
            self.done[measurement.key] = measurement

    def _header(self, line: str) -> dict[str, Value]:
        try:
            content = json.loads(line)
            if content["format"] != FORMAT:
                raise ValueError("format")
            return dict(content["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is no file of measurements of this version (expected format {FORMAT}): "
                "give another output_dir, or overwrite=true"
            ) from error


def move_aside(path: Path) -> Path:
    """Rename to the first free `name-<number>.suffix` and return that."""
    number = 1
    while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return aside
