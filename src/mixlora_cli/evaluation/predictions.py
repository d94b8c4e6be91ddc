"""The predictions file: one JSON line for each answered instance, appended as answers come, safe to kill at any byte.

The first line is a header whose fingerprint says what the answers depend on: model, adapter, data, prompt, decoding. A
file with another fingerprint is moved aside, never continued. Everything that scoring needs is in the lines. Of
several processes each but the main one writes a file of its own, which the main one takes in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixlora_cli.errors import UserError
from mixlora_cli.store import Log, changed_parts, move_aside, open_log, read_log, resume_log

if TYPE_CHECKING:
    from mixlora_cli.launch import ProcessGroup

FORMAT = "mixlora-predictions/1"
FILE_NAME = "predictions.jsonl"
_WHAT_TO_DO = "move the file away and evaluate again"
Key = tuple[str, str, int]
"""What identifies an instance: split, benchmark, place in its file."""


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
    nll: float | None = None
    """Of a held-out instance: negative log-likelihood of its answers' tokens, in nats; None where nobody can tell."""
    tokens: int | None = None
    """How many tokens `nll` is the sum over."""

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


@dataclass(frozen=True)
class Contents:
    """A predictions file as read."""

    header: Header | None
    """None where a kill left less than that."""
    predictions: list[Prediction]
    """In the order of the file; of an instance that was written twice the first."""


def read_predictions(path: Path) -> Contents:
    """Read a predictions file; a last line that was cut short is left out.

    Raises UserError when it is another file or a line that is not the last cannot be read.
    """
    found = read_log(path, FORMAT, _WHAT_TO_DO)
    try:
        header = found.header and Header(*(found.header[key] for key in ("fingerprint", "count", "about")))
        by_key: dict[Key, Prediction] = {}
        for prediction in map(_prediction, found.records):
            by_key.setdefault(prediction.key, prediction)
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} holds a line that is no prediction ({error}): {_WHAT_TO_DO}") from error
    return Contents(header or None, list(by_key.values()))


def _prediction(record: dict[str, Any]) -> Prediction:
    for name in ("answers", "labels"):
        if name in record:
            record[name] = _shared(tuple(record[name]))
    return Prediction(**{"id": "", "target": "", "question": "", "prediction": "", **record})


@lru_cache(maxsize=256)
def _shared(values: tuple[str, ...]) -> tuple[str, ...]:
    """One object for each set of labels: ten thousand lines repeat the same hundred."""
    return values


class PredictionLog:
    """A predictions file that is open for writing; every `append` is on the disk when it returns."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.done = set(map(_key, log.records))
        """Keys of the instances that are answered."""

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Write them in one go."""
        # 40,000 lines of empty fields would only slow reading down
        self._log.append(
            {name: value for name, value in vars(prediction).items() if value not in ("", (), None)}
            for prediction in predictions
        )
        self.done.update(prediction.key for prediction in predictions)


def _key(record: Mapping[str, Any]) -> Key:
    return record["split"], record["benchmark"], record["index"]


@contextmanager
def open_predictions(
    path: Path, header: Header, announce: Callable[[str], None] = print
) -> Iterator[PredictionLog]:
    """Continue the predictions file at `path` if it was made with the same settings, else start a new one.

    A file made with other settings is moved aside (`predictions.1.jsonl`) and `announce`d with what changed.
    Raises UserError when the file cannot be read.
    """
    with open_log(path, {"format": FORMAT, **vars(header)}, _WHAT_TO_DO, announce) as log:
        found = PredictionLog(log)
        if found.done:
            announce(f"continuing: {len(found.done)} of {header.count} answers are there already")
        yield found


@contextmanager
def open_share(
    path: Path, header: Header, team: ProcessGroup, announce: Callable[[str], None]
) -> Iterator[PredictionLog]:
    """This process's file; its `done` are the instances that were answered before, the same in all processes.

    Every process must call it.
    """
    if team.is_main:
        take_in_rank_files(path)
        with open_predictions(path, header, announce) as log:
            team.wait()
            team.wait()  # appends to the file that the others have just read
            yield log
    else:
        team.wait()
        before = {prediction.key for prediction in read_predictions(path).predictions}
        with open_predictions(rank_file(path, team.rank), header) as log:
            log.done |= before
            team.wait()
            yield log


def rank_file(path: Path, rank: int) -> Path:
    """`predictions.rank3.jsonl` beside `predictions.jsonl`."""
    return path.with_suffix(f".rank{rank}.jsonl")


def take_in_rank_files(path: Path) -> None:
    """Append what other processes' files beside `path` hold to it, then delete them, whatever their number.

    One of other settings than the file's is moved aside. Raises UserError when a file cannot be read.
    """
    pattern = re.compile(rf"{re.escape(path.stem)}\.rank\d+\.jsonl")
    files = sorted(each for each in path.parent.glob(f"{path.stem}.rank*") if pattern.fullmatch(each.name))
    ours = read_log(path, FORMAT, _WHAT_TO_DO, header_only=True).header if files and path.exists() else None
    for file in files:
        found = read_log(file, FORMAT, _WHAT_TO_DO)
        if found.header is None:
            file.unlink()
        elif ours is None or changed_parts(ours["fingerprint"], found.header["fingerprint"]):
            move_aside(file)
        else:
            with resume_log(path, FORMAT, _WHAT_TO_DO) as log:
                known = set(map(_key, log.records))
                log.append(record for record in found.records if _key(record) not in known)
            file.unlink()


def find_evaluation(folder: str | Path) -> Path:
    """The folder with predictions: `folder` itself, or `eval` in the run folder that it is.

    Raises UserError when there are none in either.
    """
    place = Path(folder).expanduser()
    for candidate in (place, place / "eval"):
        if (candidate / FILE_NAME).is_file():
            return candidate
    missing = "there is no" if place.is_dir() else "no such folder; expected one with"
    inner = ", ".join(str(file.parent) for file in sorted(place.glob(f"*/{FILE_NAME}")))
    way_out = f"it is in {inner}" if inner else "give the folder of a `mixlora eval`, or its run's"
    raise UserError(f"run={folder}: {missing} {FILE_NAME}; {way_out}")


def read_finished(folder: Path) -> tuple[Header, list[Prediction]]:
    """Header and answers of a finished evaluation.

    Raises UserError when there are none, or fewer than are wanted.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist: run `mixlora eval` first")
    found = read_predictions(path)
    if found.header is None or len(found.predictions) < found.header.count:
        there = f"{len(found.predictions)} of {found.header.count}" if found.header else "none"
        raise UserError(
            f"{path} is not finished ({there} answers): run the same `mixlora eval` again, it continues"
        )
    return found.header, found.predictions
