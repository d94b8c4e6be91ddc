"""The predictions file: one JSON line for each answered instance, appended as answers come and safe to kill
at any byte.

The first line is a header whose fingerprint says what the answers depend on: model, adapter, data, prompt,
decoding. A file with another fingerprint is moved aside, never continued. Everything that scoring needs is in
the lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.done import Done, Key
from mixlora_cli.evaluation.lines import JsonLines

FORMAT = "mixlora-predictions/1"
FILE_NAME = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """One instance and the answer that a model gave to it."""

    split: str
    """"unseen" (a benchmark) or "heldout" (a task seen in training)."""
    index: int
    """Position in the split's data file: ids need not be unique, positions are."""
    benchmark: str
    """The benchmark's name; the task's for held-out instances."""
    id: str
    question: str
    target: str
    prediction: str
    category: str = ""
    image_id: str = ""
    """What pairs the questions about one image."""
    answers: tuple[str, ...] = ()
    """Several people's answers, where the rule needs them."""
    labels: tuple[str, ...] = ()
    """The closed set of labels that `target` is one of, where there is one."""
    image: str = ""

    @property
    def key(self) -> Key:
        """What identifies the instance within the file."""
        return self.split, self.benchmark, self.index


@dataclass(frozen=True)
class Header:
    """First line of a predictions file."""

    fingerprint: Mapping[str, str]
    """What the answers depend on, each part named: two files with equal fingerprints hold equal answers."""
    count: int
    """How many instances the whole evaluation has."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What does not change an answer: label, run folder, limit, seed, versions."""

    def differences(self, other: Header) -> list[str]:
        """Names of the fingerprint's parts that differ."""
        names = dict.fromkeys([*self.fingerprint, *other.fingerprint])
        return [name for name in names if self.fingerprint.get(name) != other.fingerprint.get(name)]


def _line(record: Header | Prediction) -> bytes:
    content = dict(vars(record))  # `asdict` would copy every set of labels
    if isinstance(record, Header):
        content = {"format": FORMAT, **content}
    else:  # 40,000 lines of empty fields would only slow reading down
        content = {name: value for name, value in content.items() if value != "" and value != ()}
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def _header(content: Any, path: Path) -> Header:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path} is no predictions file of this version: expected a first line with format {FORMAT}"
        )
    return Header(content["fingerprint"], content["count"], content["about"])


_SHARED_SETS = ("answers", "labels")


@lru_cache(maxsize=256)
def _shared(values: tuple[str, ...]) -> tuple[str, ...]:
    """One object for each set of labels: ten thousand lines repeat the same hundred."""
    return values


def _prediction(content: dict[str, Any]) -> Prediction:
    for name in _SHARED_SETS:
        if name in content:
            content[name] = _shared(tuple(content[name]))
    return Prediction(**{"id": "", "target": "", "question": "", "prediction": "", **content})


@dataclass(frozen=True)
class Contents:
    """A predictions file as read: `end` is the offset behind the last whole line, `torn`: more follows."""

    header: Header | None
    predictions: list[Prediction]
    end: int
    torn: bool


class PredictionReader:
    """Goes through a predictions file line by line; holds one prediction at a time.

    `header`, `end` and `torn` (as in `Contents`) are known once all predictions were gone through. An instance that
    was written twice comes once, the first time. A half-written last line is left out and reported as `torn`.
    """

    def __init__(self, path: Path) -> None:
        self.header: Header | None = None
        self.done = Done()
        """Keys of the predictions gone through so far."""
        self._path = path
        self._lines = JsonLines(path, self._read, "move the file away and evaluate again")

    @property
    def end(self) -> int:
        """Offset behind the last whole line."""
        return self._lines.end

    @property
    def torn(self) -> bool:
        """A half-written line follows."""
        return self._lines.torn

    def __iter__(self) -> Iterator[Prediction]:
        """Raises UserError when the file is no predictions file or a line that is not the last cannot be read."""
        return (prediction for prediction in self._lines if self.done.add(prediction.key))

    def _read(self, content: Any) -> Prediction | None:
        if self.header is None:
            self.header = _header(content, self._path)
            return None
        return _prediction(content)


def read_header(path: Path) -> Header | None:
    """The first line alone; None where it is not whole. Raises UserError for another kind of file."""
    with path.open("rb") as file:
        line = file.readline()
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        content = None
    return None if content is None else _header(content, path)


def read_predictions(path: Path) -> Contents:
    """Read a whole predictions file into memory; see `PredictionReader`, which does not."""
    reader = PredictionReader(path)
    predictions = list(reader)
    return Contents(reader.header, predictions, reader.end, reader.torn)


class PredictionWriter:
    """Appends predictions to a file; every `append` is on the disk when it returns."""

    def __init__(self, file: BinaryIO, done: Done | None = None) -> None:
        self._file = file
        self.done = Done() if done is None else done
        """Keys of the instances that are answered."""

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Write whole lines in one go and wait until the disk has them."""
        if not predictions:
            return
        self._file.write(b"".join(_line(prediction) for prediction in predictions))
        self._file.flush()
        os.fsync(self._file.fileno())
        for prediction in predictions:
            self.done.add(prediction.key)

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def move_aside(path: Path) -> Path:
    """Rename a file to the first free `<name>.<number>.jsonl`."""
    number = 1
    while (aside := path.with_suffix(f".{number}.jsonl")).exists():
        number += 1
    return path.rename(aside)


def _start(path: Path, header: Header) -> PredictionWriter:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("wb")
    file.write(_line(header))
    file.flush()
    os.fsync(file.fileno())
    return PredictionWriter(file)


def open_predictions(path: Path, header: Header, announce: Callable[[str], None] = print) -> PredictionWriter:
    """Continue the predictions file at `path` if it was made with the same settings, else start a new one.

    A file made with other settings is moved aside (`predictions.1.jsonl`) and `announce`d with what changed.
    A half-written last line is cut off. Raises UserError when the file cannot be read.
    """
    if not path.exists():
        return _start(path, header)
    found = PredictionReader(path)
    for _ in found:
        pass
    if found.header is None:  # killed while the header was written: nothing to keep
        return _start(path, header)
    if changed := header.differences(found.header):
        aside = move_aside(path)
        announce(
            f"{path.name} was made with other settings ({', '.join(changed)} changed): "
            f"kept as {aside.name}, starting anew"
        )
        return _start(path, header)
    if found.done:
        announce(f"continuing: {len(found.done)} of {header.count} answers are there already")
    return _append_to(path, found)


def resume_predictions(path: Path) -> PredictionWriter:
    """Go on writing a predictions file whatever its settings. Raises UserError when it cannot be read."""
    found = PredictionReader(path)
    for _ in found:
        pass
    return _append_to(path, found)


def _append_to(path: Path, found: PredictionReader) -> PredictionWriter:
    """Behind the last whole line of a file that was gone through."""
    file = path.open("r+b")
    file.truncate(found.end)
    file.seek(found.end)
    return PredictionWriter(file, found.done)
