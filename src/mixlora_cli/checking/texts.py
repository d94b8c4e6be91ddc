"""The text part: every record's fields, turns, picture path, length and label mask, in parallel processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mixlora_cli.checking.findings import Mistake, Remark, Sort
from mixlora_cli.data.encode import TextSide, encode, verify_labels
from mixlora_cli.data.images import stamp
from mixlora_cli.data.problems import BadRecord
from mixlora_cli.data.records import Record, parse_record, task_name
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.errors import UserError

CHUNK = 1000
_VERIFIED_PER_TASK = 2  # label masks of each task in each chunk


@dataclass(frozen=True)
class Rules:
    """What every record is held against."""

    images: Path | None
    """Picture folder of the split."""
    max_length: int
    tasks: frozenset[str] | None = None
    """Only these; None = all."""
    text_side: TextSide | None = None
    """Tokenizer and template for lengths and label masks; None leaves them out."""


@dataclass(frozen=True)
class Summary:
    """What later comparisons need of a good record."""

    index: int
    id: str
    task: str
    benchmark: str
    image: Path | None
    content: bytes
    """Digest of picture path and turns."""
    answered: bytes
    """Digest of the questions and answers, as `normalised`."""
    asked: bytes
    """Digest of the questions alone."""


@dataclass
class ChunkResult:
    """What came of one stretch of records."""

    seen: int = 0
    found: list[tuple[int, Sort, str]] = field(default_factory=list)
    """Index, sort and detail of each finding."""
    good: list[Summary] = field(default_factory=list)


def check_texts(raws: Iterable[tuple[int, Any]], rules: Rules, workers: int) -> Iterator[ChunkResult]:
    """Results of all records, stretch by stretch in the order of the records."""
    chunks = _chunks(raws)
    if workers == 1:
        yield from (check_chunk(chunk, rules) for chunk in chunks)
        return
    if rules.images is not None:
        stamp(rules.images / "x")  # opens an archive here, so that forked workers need not read its directory
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, initializer=_Worker.begin, initargs=(rules,)) as pool:
        yield from _in_order(pool, chunks, 2 * workers)


def _chunks(raws: Iterable[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    rows = iter(raws)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _in_order(
    pool: ProcessPoolExecutor, chunks: Iterator[list[tuple[int, Any]]], most: int
) -> Iterator[ChunkResult]:
    """Results in the order of the chunks, of which at most `most` are read ahead."""
    running: list[Future[ChunkResult]] = []
    for chunk in chunks:
        running.append(pool.submit(_Worker.check, chunk))
        if len(running) >= most:
            wait(running[:1], return_when=FIRST_COMPLETED)
            yield running.pop(0).result()
    for future in running:
        yield future.result()


class _Worker:
    """The rules of a worker process, which are sent to it once and not with every chunk."""

    rules: Rules

    @classmethod
    def begin(cls, rules: Rules) -> None:
        cls.rules = rules

    @classmethod
    def check(cls, chunk: Sequence[tuple[int, Any]]) -> ChunkResult:
        return check_chunk(chunk, cls.rules)


def check_chunk(chunk: Sequence[tuple[int, Any]], rules: Rules) -> ChunkResult:
    """Check some records; those of other tasks than `rules.tasks` are passed over."""
    result = ChunkResult()
    verified: dict[str, int] = {}
    for index, raw in chunk:
        try:
            if rules.tasks is not None and task_name(raw) not in rules.tasks:
                continue
            result.seen += 1
            record = parse_record(index, raw, rules.images)
            if rules.text_side is not None:
                _check_tokens(record, rules.text_side, rules.max_length, verified, result)
        except BadRecord as bad:
            result.found.append((index, bad.kind, bad.detail))
            continue
        result.good.append(summarise(record))
    return result


def _check_tokens(
    record: Record, side: TextSide, max_length: int, verified: dict[str, int], result: ChunkResult
) -> None:
    """Length, and the label mask of the first records of each task. Raises BadRecord."""
    encoded = encode(record, side, max_length)
    if encoded.num_dropped:
        length = len(encoded.input_ids) + encoded.num_dropped
        result.found.append((record.index, Remark.OVER_LENGTH, f"{length} tokens, {max_length} allowed"))
    if verified.setdefault(record.task, 0) < _VERIFIED_PER_TASK:
        verified[record.task] += 1
        try:
            verify_labels(encoded, record, side)
        except UserError as error:
            result.found.append((record.index, Mistake.LABELS, str(error)))


def summarise(record: Record) -> Summary:
    """Digests of a good record."""
    questions = [normalised(turn.text) for turn in record.conversation if turn.role == "human"]
    answers = [normalised(turn.text) for turn in record.conversation if turn.role == "gpt"]
    turns = [turn.text.replace(IMAGE_MARKER, "").strip() for turn in record.conversation]
    return Summary(
        record.index,
        str(record.extra.get("source_id", record.id)),
        record.task,
        str(record.extra.get("benchmark") or record.task),
        record.image,
        _digest([str(record.image), *turns]),
        _digest([*questions, "", *answers]),
        _digest(questions),
    )


def normalised(text: str) -> str:
    """Text without marker, case and differences in white space."""
    return " ".join(text.replace(IMAGE_MARKER, " ").casefold().split())


def _digest(texts: Sequence[str]) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
