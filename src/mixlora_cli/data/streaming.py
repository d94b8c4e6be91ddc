"""Training records one after the other, for data that does not fit: nothing is held but a buffer that mixes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from mixlora_cli.config import DataConfig
from mixlora_cli.data.images import open_fully
from mixlora_cli.data.loading import DataFiles, Part, Split, locate_files
from mixlora_cli.data.problems import BadRecord, Problem
from mixlora_cli.data.records import Record, parse_record, task_of
from mixlora_cli.data.sources import stream_raws
from mixlora_cli.errors import UserError, cut
from mixlora_cli.progress import say

BUFFER = 1000
"""Records that are mixed at once, fewer where their pictures take more than `BUFFER_BYTES`."""
BUFFER_BYTES = 256_000_000
_TOLD = 3  # bad records that are shown


def stream_records(
    data: DataConfig, split: Split, seed: int, rank: int = 0, world_size: int = 1
) -> Iterator[Record]:
    """One pass over a split's records, in an order that depends on the seed.

    Pictures that are in the records stay bytes; every picture is decoded once, to see that it can be. Of several parts
    the next record's is drawn by weight; a part that ends begins again until every one has ended once.

    Args:
        data: `data.on_error` "skip" leaves bad records out, and says how many when the pass ends.
        split: whose records.
        seed: of the order.
        rank: of this process: it gets every `world_size`-th record of each part.
        world_size: number of processes.

    Raises:
        UserError: a path is wrong, a part has no usable record for this process, or a record is bad and `data.on_error`
            is "stop".
    """
    files = locate_files(data, split)
    generator = random.Random(f"{seed}/{rank}")
    problems = _Problems(data, files.source)
    try:
        passes = [_reader(part, files, data, split, rank, world_size, problems) for part in files.parts]
        yield from _mixed(_drawn(files.parts, passes, generator), generator)
    finally:
        problems.say()


class _Problems:
    """Bad records: the first stops, or all are counted."""

    def __init__(self, data: DataConfig, source: str) -> None:
        self._stops, self._source = data.on_error == "stop", source
        self.count, self._first = 0, list[str]()

    def add(self, where: str, problem: Problem) -> None:
        told = f"{where}, record {problem.index}: {problem.kind.value}: {' '.join(problem.detail.split())}"
        if self._stops:
            raise UserError(f"{told}; mend it or pass data.on_error=skip to go on without such records")
        self.count += 1
        self._first += [told] if len(self._first) < _TOLD else []

    def say(self) -> None:
        if self.count:
            say(f"left out {self.count:,} bad records of {self._source}; the first: {'; '.join(self._first)}")


def _reader(
    part: Part,
    files: DataFiles,
    data: DataConfig,
    split: Split,
    rank: int,
    world_size: int,
    problems: _Problems,
) -> Callable[[], Iterator[Record]]:
    """What opens a pass over the records of one part."""
    wanted = None if split == "unseen" or data.tasks is None else set(data.tasks)

    def read() -> Iterator[Record]:
        is_empty = True
        for found in stream_raws(part.place):
            index = found.index if isinstance(found, Problem) else found[0]
            if index % world_size != rank:
                continue
            try:
                if isinstance(found, Problem):
                    raise BadRecord(found.kind, found.detail)
                if wanted is not None and task_of(found[1], part.task, data.task_key) not in wanted:
                    continue
                record = parse_record(index, found[1], files.images, part.task, data.task_key)
                for picture in record.images:
                    open_fully(picture)
            except BadRecord as bad:
                problems.add(part.place, Problem(index, bad.kind, bad.detail))
                continue
            is_empty = False
            yield record
        if is_empty:
            among = "" if wanted is None else f" of data.tasks=[{','.join(map(cut, sorted(wanted)))}]"
            whose = "" if world_size == 1 else f" for process {rank} of {world_size}"
            raise UserError(f"{part.place}: no usable record{among}{whose}; expected at least one")

    return read


def _drawn(
    parts: Sequence[Part], passes: Sequence[Callable[[], Iterator[Record]]], generator: random.Random
) -> Iterator[Record]:
    """Records of all parts, drawn by weight, until each has been read to its end."""
    readers = [begin() for begin in passes]
    ended: set[int] = set()
    weights = [part.weight for part in parts]
    while True:
        (chosen,) = generator.choices(range(len(parts)), weights)
        record = next(readers[chosen], None)
        if record is None:
            ended.add(chosen)
            if len(ended) == len(parts):
                return
            readers[chosen] = passes[chosen]()
            record = next(readers[chosen])
        yield record


def _mixed(records: Iterator[Record], generator: random.Random) -> Iterator[Record]:
    """The records in another order: each waits in a buffer until it is drawn."""
    buffer: list[Record] = []
    held = 0
    for record in records:
        buffer.append(record)
        held += _size(record)
        while len(buffer) > BUFFER or (held > BUFFER_BYTES and len(buffer) > 1):
            drawn = _draw(buffer, generator)
            held -= _size(drawn)
            yield drawn
    while buffer:
        yield _draw(buffer, generator)


def _draw(buffer: list[Record], generator: random.Random) -> Record:
    place = generator.randrange(len(buffer))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def _size(record: Record) -> int:
    return sum(len(picture) for picture in record.images if isinstance(picture, bytes))
