"""From the data's configuration to checked records and task definitions, before a model is loaded.

Vision-Flan as `mixlora prepare data=vision_flan` leaves it is read without holding it in memory:

    <root>/records/           the records as an Arrow data set, mapped into memory when read
    <root>/definitions.json   {task: {"definition": str, "origin": "metadata" | "questions"}}
    <root>/images/            the unpacked pictures, with prepare.unpack=true
    <root>/prepared.json      what was prepared from what, written last

A row has `id` (unique: the picture's name, with a number where several records share the picture), `source_id` (the id
in the annotation file, which is not unique), `task_name`, `image` (null without a picture) and `conversations`.
"""

from __future__ import annotations

import json
import math
import random
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixlora_cli.config import DataConfig
from mixlora_cli.data.embedded import picture_store
from mixlora_cli.data.images import check_images, split_archive
from mixlora_cli.data.problems import BadRecord, Kind, Problem, settle
from mixlora_cli.data.records import Record, parse_record, task_of
from mixlora_cli.data.sources import place_of, read_raws
from mixlora_cli.errors import UserError, cut, hint_at
from mixlora_cli.paths import cache_root
from mixlora_cli.progress import say

Split = Literal["train", "heldout", "unseen"]

FORMAT = 1
"""Raise when the files of a prepared folder change their meaning."""
RECORDS, DEFINITIONS, IMAGES, MANIFEST = "records", "definitions.json", "images", "prepared.json"
_COMMAND = "mixlora prepare data=vision_flan"


@dataclass(frozen=True)
class Part:
    """One of the places that a split's records come from."""

    place: str
    """File, folder or data set of the hub; see `data.sources.place_of`."""
    task: str | None = None
    """Of every record in it; None = each record names its own."""
    weight: float = 1.0
    """How often a record of it is seen in an epoch."""


@dataclass(frozen=True)
class DataFiles:
    """Where one split's records, pictures and task definitions are."""

    parts: tuple[Part, ...]
    images: Path | None
    """Folder that the records' paths are relative to, or a folder inside an archive; None where none is given."""
    metadata: Path | None

    @property
    def source(self) -> str:
        """The places, for messages."""
        return ", ".join(part.place for part in self.parts)

    @property
    def pictures(self) -> Path:
        """Folder that pictures are named relative to: `images`, else that of pictures in the records themselves."""
        return picture_store() if self.images is None else self.images


def locate_files(data: DataConfig, split: Split) -> DataFiles:
    """Files of a split; the mini data is built on first use.

    Raises:
        UserError: the configuration names no file for the split, the image folder does not exist, or the data was not
            prepared.
    """
    if data.source == "mini":
        from mixlora_cli.data.mini.build import mini_root  # the generator is only loaded where it is used

        root = mini_root()
        part = Part(str(root / f"{split}.json"))
        return DataFiles((part,), (root / "images").resolve(), root / "metadata.json")
    if data.source == "mini_text":
        from mixlora_cli.data.mini.build import mini_text_root

        root = mini_text_root()
        return DataFiles((Part(str(root / f"{split}.json")),), None, root / "metadata.json")
    if data.source == "vision_flan" and split == "train":
        root, images = _prepared(data)
        return DataFiles((Part(str(root / RECORDS)),), images, definitions_file(data))
    given = {"train": data.train, "heldout": data.heldout, "unseen": data.unseen}[split]
    if given is None:
        raise UserError(
            f"data.{split}=null: expected the path of a JSON annotation file (data.{split}=<file>)"
        )
    parts = parts_of(given)
    for part in parts:
        place = place_of(part.place)
        if split != "train" and place.on_hub and place.split is None:
            raise UserError(f"data.{split}={part.place}: say which split, as in {place.name}:validation")
    folder = None if data.images is None else Path(data.images).expanduser()
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"data.images={data.images}: no such folder; expected the folder that image paths are relative to"
        )
    metadata = None if data.metadata is None else Path(data.metadata).expanduser()
    return DataFiles(parts, None if folder is None else folder.resolve(), metadata)


def parts_of(given: str | Mapping[str, Any]) -> tuple[Part, ...]:
    """The places that a checked configuration names, one or one for each task."""
    if isinstance(given, str):
        return (Part(given),)
    entries = {
        task: entry if isinstance(entry, Mapping) else {"file": entry} for task, entry in given.items()
    }
    return tuple(Part(entry["file"], task, entry.get("weight", 1.0)) for task, entry in entries.items())


def definitions_file(data: DataConfig) -> Path | None:
    """Where the tasks' definitions are, if anywhere."""
    if data.is_built_in:
        return locate_files(data, "train").metadata
    if data.source == "vision_flan" and data.metadata is None:
        return _prepared(data)[0] / DEFINITIONS
    return None if data.metadata is None else Path(data.metadata).expanduser()


def prepared_root(data: DataConfig) -> Path:
    """`data.root`, else `vision-flan` in the cache folder."""
    return cache_root() / "vision-flan" if data.root is None else Path(data.root).expanduser()


def read_manifest(root: Path) -> dict[str, Any] | None:
    """What was prepared in `root`; None where no preparation has ended."""
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def _prepared(data: DataConfig) -> tuple[Path, Path]:
    """The folder of a complete preparation, and that of its pictures.

    Raises:
        UserError: there is none, it was not finished, or its pictures have gone.
    """
    root = prepared_root(data)
    manifest = read_manifest(root)
    if manifest is None:
        state = f"the preparation in {root} is not complete" if root.is_dir() else f"not prepared: no {root}"
        raise UserError(
            f"data={data.name}: {state}; run `{_COMMAND}`, which goes on where it stopped (data.root=<folder> for "
            "one that is somewhere else)"
        )
    images = root / IMAGES if manifest["images"] is None else Path(manifest["images"])
    inside = split_archive(images)
    if inside is None and not images.is_dir():
        raise UserError(
            f"data={data.name}: its pictures were in {images}, which is gone; put it back, or run `{_COMMAND}` with "
            "the new place and prepare.overwrite=true"
        )
    if inside is not None and not zipfile.is_zipfile(inside[0]):
        raise UserError(f"data={data.name}: {inside[0]} is no longer a whole zip archive; download it again")
    return root, images if inside else images.resolve()


def load_records(data: DataConfig, split: Split, seed: int = 0) -> list[Record]:
    """Checked records of a split, in file order.

    `data.tasks` keeps only these tasks of the seen splits; `data.max_per_task` samples the training split with `seed`,
    the same records on every machine, and a part's weight says how often each of its records is in the list. Texts are
    checked before sampling, pictures after: what is not used is not opened.

    Raises:
        UserError: a path or task name is wrong, nothing is left, the split is streamed, or there are bad records and
            `data.on_error` is "stop"; with "skip" they are left out, counted and reported.
    """
    if split == "train" and data.streaming:
        raise UserError(
            "data.streaming=true: only `mixlora train` reads records one after the other, and this needs all training "
            "records at once; give data.streaming=false and a part of them that fits"
        )
    files = locate_files(data, split)
    wanted = None if split == "unseen" or data.tasks is None else set(data.tasks)
    records: list[Record] = []
    problems: list[Problem] = []
    known: set[str] = set()
    starts: list[int] = []
    read = 0
    for part in files.parts:
        raws, found = read_raws(part.place)
        starts.append(read)
        for problem in found:
            if problem.kind is Kind.CUT_SHORT and data.on_error == "stop":
                raise UserError(
                    f"{part.place}: broken JSON: {problem.detail}; if the file was cut short, copy or download it again"
                )
            problems.append(Problem(read + problem.index, problem.kind, problem.detail))
        for number, raw in raws:
            try:
                task = task_of(raw, part.task, data.task_key)
                known.add(task)
                if wanted is None or task in wanted:
                    records.append(
                        parse_record(
                            read + number, raw, files.images, part.task, data.task_key, picture_store()
                        )
                    )
            except BadRecord as bad:
                if bad.kind is Kind.MISSING_IMAGE and files.images is None:
                    raise UserError(
                        f"{part.place}: records have images, but data.images=null; pass data.images=<folder>"
                    ) from None
                problems.append(Problem(read + number, bad.kind, bad.detail))
        read += len(raws) + len(found)
    for task in data.tasks or () if wanted else ():
        if task not in known:
            raise UserError(
                f"data.tasks={cut(task)}: no such task in {files.source}; {hint_at(task, known, 'tasks')}"
            )
    if split == "train" and data.max_per_task is not None:
        records = sample_per_task(records, data.max_per_task, seed)
    broken = check_images((path for each in records for path in each.files), files.pictures, cache_root())
    good = []
    for record in records:
        wrong = next((broken[path] for path in record.files if path in broken), None)
        if wrong is None:
            good.append(record)
        else:
            problems.append(Problem(record.index, wrong.kind, wrong.detail))
    source = files.source if len(starts) == 1 else with_ranges(files.parts, starts)
    settle(problems, source, len(good) + len(problems), data.on_error)
    if not good:
        raise UserError(f"{source}: no usable record; expected at least one")
    return weighted(good, files.parts, starts, seed)


def task_names(data: DataConfig) -> list[str]:
    """Tasks that the training records name, in the order that they come; nothing else of the records is looked at.

    Raises:
        UserError: the records cannot be read.
    """
    names: dict[str, None] = {}
    for part in locate_files(data, "train").parts:
        for _, raw in read_raws(part.place)[0]:
            with suppress(BadRecord):
                names[task_of(raw, part.task, data.task_key)] = None
    return list(names)


def with_ranges(parts: Sequence[Part], starts: Sequence[int]) -> str:
    """The places of several parts for messages, with the numbers that their records have."""
    places = zip(parts, starts, strict=True)
    return ", ".join(f"{part.place} (from record {start} on)" for part, start in places)


def weighted(
    records: Sequence[Record], parts: Sequence[Part], starts: Sequence[int], seed: int
) -> list[Record]:
    """Each record as often as its part's weight says, in the old order; of a fraction, a seeded sample of the part."""
    if all(part.weight == 1.0 for part in parts):
        return list(records)
    result: list[Record] = []
    for part, start, end in zip(parts, starts, [*starts[1:], math.inf], strict=True):
        own = [record for record in records if start <= record.index < end]
        whole, rest = divmod(part.weight, 1.0)
        generator = random.Random(f"{seed}/{part.task}")
        sample = generator.sample(own, round(rest * len(own)))
        chosen = sorted([*own * int(whole), *sample] or own[:1], key=lambda record: record.index)
        say(
            f"{cut(part.task)}: {len(own):,} records with weight {part.weight:g}, {len(chosen):,} in an epoch"
        )
        result += chosen
    return result


def sample_per_task(records: Sequence[Record], max_per_task: int, seed: int) -> list[Record]:
    """At most `max_per_task` records of each task, in their old order.

    Each task has its own generator, so that leaving a task out does not change the others' samples.
    """
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    kept: set[int] = set()
    for task, members in by_task.items():
        if len(members) > max_per_task:
            # seeded with a string: hashed by the generator itself, alike in every process
            members = random.Random(f"{seed}/{task}").sample(members, max_per_task)
        kept.update(record.index for record in members)
    return [record for record in records if record.index in kept]
