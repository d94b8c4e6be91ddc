"""What the training records share with an evaluation set: pictures, near-duplicates of pictures, texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mixlora_cli.checking.findings import Found
from mixlora_cli.checking.prints import Print, nearest
from mixlora_cli.checking.texts import Summary
from mixlora_cli.errors import cut


@dataclass
class Leak:
    """One evaluation set against the training records."""

    benchmark: str
    records: int
    pictures: int
    """Different picture files."""
    source: str = ""
    """Where a benchmark that does not come with the data is from."""
    same_picture: Found = field(default_factory=Found)
    """Pictures whose bytes a training picture has."""
    near_picture: Found = field(default_factory=Found)
    """Other pictures whose perceptual hash is near that of a training picture."""
    plain_pictures: int = 0
    """Pictures too plain for that comparison."""
    training_tasks: dict[str, int] = field(default_factory=dict)
    """Same and near pictures by the tasks whose pictures they are like; most first."""
    same_text: Found = field(default_factory=Found)
    """Records whose question and answer are those of a training record."""
    same_picture_and_question: Found = field(default_factory=Found)
    """Records that ask a training question about a training picture (equal bytes)."""

    @property
    def parts(self) -> tuple[Found, Found, Found, Found]:
        """Everything that was found, by sort."""
        return self.same_picture, self.near_picture, self.same_text, self.same_picture_and_question

    @property
    def total(self) -> int:
        return sum(found.count for found in self.parts)


class TrainingSide:
    """The training records, indexed for comparison.

    `prints` holds the fingerprints of their pictures; pictures without one are not compared.
    """

    def __init__(self, records: Sequence[Summary], prints: Mapping[Path, Print]) -> None:
        self.texts = {record.answered: record.index for record in records}
        self.pictures: dict[str, Path] = {}
        self.asked: dict[tuple[str, bytes], int] = {}
        self.tasks: dict[str, tuple[str, ...]] = {}
        """Tasks by digest and by perceptual hash of their pictures."""
        for record in records:
            known = None if record.image is None else prints.get(record.image)
            if known is not None and record.image is not None:
                self.pictures.setdefault(known.bytes_digest, record.image)
                self.asked.setdefault((known.bytes_digest, record.asked), record.index)
                for key in (known.bytes_digest, known.perceptual):
                    if record.task not in (before := self.tasks.get(key, ())):
                        self.tasks[key] = (*before, record.task)
        looks = {known.perceptual: path for path, known in prints.items() if not known.is_plain}
        self.hashes, self.hash_paths = list(looks), list(looks.values())


def compare(
    benchmark: str,
    records: Sequence[Summary],
    prints: Mapping[Path, Print],
    training: TrainingSide,
    near: int,
    num_examples: int,
    source: str = "",
) -> Leak:
    """Count what `records` share with the training side; `near` is the largest number of differing bits."""
    paths = list(dict.fromkeys(record.image for record in records if record.image is not None))
    leak = Leak(benchmark, len(records), len(paths), source)
    tasks: Counter[str] = Counter()
    for path, twin, known, distance in _alike(paths, prints, training, near, leak):
        tasks.update(training.tasks.get(known, ()))
        if distance is None:
            _add(leak.same_picture, f"{cut(path.name)} = {cut(twin.name)}", num_examples)
        else:
            example = f"{cut(path.name)} ~ {cut(twin.name)} ({distance} of 256 bits differ)"
            _add(leak.near_picture, example, num_examples)
    leak.training_tasks = dict(tasks.most_common())
    for record in records:
        _compare_texts(record, prints, training, leak, num_examples)
    return leak


def _alike(
    paths: Sequence[Path], prints: Mapping[Path, Print], training: TrainingSide, near: int, leak: Leak
) -> Iterator[tuple[Path, Path, str, int | None]]:
    """Each picture with the training picture that it is like, that one's key in `training.tasks`, and the bits in which
    their hashes differ; None for equal bytes. Plain pictures are counted in `leak`.
    """
    others: list[Path] = []
    for path in paths:
        known = prints.get(path)
        if known is None:
            continue
        if known.bytes_digest in training.pictures:
            yield path, training.pictures[known.bytes_digest], known.bytes_digest, None
        elif known.is_plain:
            leak.plain_pictures += 1
        else:
            others.append(path)
    found = nearest([prints[path].perceptual for path in others], training.hashes)
    for path, (position, distance) in zip(others, found, strict=bool(found)):
        if distance <= near:
            yield path, training.hash_paths[position], training.hashes[position], distance


def _compare_texts(
    record: Summary, prints: Mapping[Path, Print], training: TrainingSide, leak: Leak, num_examples: int
) -> None:
    twin = training.texts.get(record.answered)
    if twin is not None:
        _add(leak.same_text, f"record {record.index} = training record {twin}", num_examples)
    known = None if record.image is None else prints.get(record.image)
    asked = None if known is None else training.asked.get((known.bytes_digest, record.asked))
    if asked is not None:
        example = f"record {record.index} = training record {asked}"
        _add(leak.same_picture_and_question, example, num_examples)


def _add(found: Found, example: str, num_examples: int) -> None:
    found.count += 1
    if len(found.examples) < num_examples:
        found.examples.append(example)
