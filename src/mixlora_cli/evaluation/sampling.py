"""`eval.limit`: a seeded, stratified sample in which the questions about one image stay together."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from mixlora_cli.data.records import Record

Unit = list[Record]


def benchmark_of(record: Record) -> str:
    """Name of the benchmark that a record belongs to: its `benchmark`, else its task."""
    return str(record.extra.get("benchmark") or record.task)


def category_of(record: Record) -> str:
    """MME subtask or POPE category, "" where there is none."""
    return str(record.extra.get("category") or "")


def grouped(records: Sequence[Record], key: Callable[[Record], str]) -> dict[str, list[Record]]:
    """Records by key, both in the order they come."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return dict(groups)


def _units(records: Sequence[Record]) -> list[Unit]:
    """What is drawn as a whole: the questions that share an `image_id`, else single records."""
    return list(grouped(records, _unit_of).values())


def _unit_of(record: Record) -> str:
    image = record.extra.get("image_id")
    return f"record {record.index}" if image is None else f"image {image}"


def _stratum(unit: Unit) -> tuple[str, ...]:
    """The unit's categories, and the answer of a single instance where it is one of a closed set of labels."""
    categories = sorted({category_of(record) for record in unit} - {""})
    labelled = len(unit) == 1 and unit[0].extra.get("labels")
    return (*categories, unit[0].conversation[-1].text) if labelled else tuple(categories)


def stratified(records: Sequence[Record], limit: int, seed: int) -> list[Record]:
    """At most `limit` of one benchmark's records, in their order in the data; each stratum keeps its share.

    Units are shuffled within strata and taken in the order of their relative rank there, (position + 1/2) /
    size, after one of each stratum. One unit is taken in any case, even if it is larger than `limit`. The
    same arguments give the same sample.
    """
    if len(records) <= limit:
        return list(records)
    generator = random.Random(f"{seed}:{benchmark_of(records[0])}")
    strata: dict[tuple[str, ...], list[Unit]] = defaultdict(list)
    for unit in _units(records):
        strata[_stratum(unit)].append(unit)
    ranked: list[tuple[float, float, Unit]] = []
    for units in strata.values():
        generator.shuffle(units)
        for position, unit in enumerate(units):
            rank = (position + 0.5) / len(units) if position else 0.0
            ranked.append((rank, generator.random(), unit))
    chosen: list[Record] = []
    for _, _, unit in sorted(ranked, key=lambda entry: entry[:2]):
        if not chosen or len(chosen) + len(unit) <= limit:
            chosen += unit
    return sorted(chosen, key=lambda record: record.index)


def limited(records: Sequence[Record], limit: int | None, seed: int) -> list[Record]:
    """`stratified` within each benchmark; all records without a limit."""
    if limit is None:
        return list(records)
    groups = grouped(records, benchmark_of)
    return [record for group in groups.values() for record in stratified(group, limit, seed)]
