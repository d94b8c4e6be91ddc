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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixlora_cli.config import DataConfig
from mixlora_cli.data.embedded import picture_store
from mixlora_cli.data.images import check_images, split_archive
from mixlora_cli.data.problems import BadRecord, Kind, Problem, settle
from mixlora_cli.data.records import Record, parse_record, task_of
from mixlora_cli.data.sources import place_of, read_raws
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.data.text_files import read_json
from mixlora_cli.errors import UserError, cut, hint_at
from mixlora_cli.paths import cache_root
from mixlora_cli.progress import say

Split = Literal["train", "heldout", "unseen"]

FORMAT = 1
"""Raise when the files of a prepared folder change their meaning."""
RECORDS, DEFINITIONS, IMAGES, MANIFEST = "records", "definitions.json", "images", "prepared.json"
_COMMAND = "mixlora prepare data=vision_flan"
TASK_KEYS = ("task_name", "task", "name")
TEXT_KEYS = ("definition", "description", "instruction")
_FORMS = 'write {"task name": {"definition": "..."}} or {"task name": "..."}'
_NAMED = 5  # tasks that a message lists
_QUESTIONS, _QUESTION_LENGTH = 3, 300
HOW_MADE = f"their names and first {_QUESTIONS} questions"
"""What `made_definitions` makes definitions of, for messages."""


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
    parts = _parts(given)
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


def _parts(given: str | Mapping[str, Any]) -> tuple[Part, ...]:
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


def load_definitions(data: DataConfig) -> dict[str, str]:
    """Definition of each task; empty when the configuration names no file of them.

    Raises:
        UserError: the file cannot be read as such.
    """
    path = definitions_file(data)
    if path is None:
        return {}
    source = f"data.metadata={path}"
    return parse_definitions(read_json(path, "a JSON file of task definitions", source), source)


def made_definitions(records: Iterable[Record]) -> dict[str, str]:
    """For each task its name and the questions of its first records, which stand in for a definition."""
    first: dict[str, list[str]] = {}
    for record in records:
        questions = first.setdefault(record.task, [])
        if len(questions) < _QUESTIONS:
            text = next(turn.text for turn in record.conversation if turn.role == "human")
            questions.append(" ".join(text.replace(IMAGE_MARKER, " ").split())[:_QUESTION_LENGTH])
    return {
        task: "\n".join([task.replace("_", " "), *dict.fromkeys(filter(None, questions))])
        for task, questions in first.items()
    }


def definitions_of(
    data: DataConfig, tasks: Iterable[str], made: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Definitions of exactly these tasks.

    Args:
        data: names the file of definitions, or none.
        tasks: whose definitions are wanted.
        made: where no file is named: those that the training has made. What they lack is made of the unseen and the
            held-out records in the same way; None: nothing is made.

    Raises:
        UserError: some task has none; names those tasks and the file that should hold them.
    """
    definitions, path = load_definitions(data), definitions_file(data)
    wanted = list(dict.fromkeys(tasks))
    if path is None and made is not None:
        definitions = dict(made)
        given: dict[Split, Any] = {"unseen": data.unseen, "heldout": data.heldout}
        for split in given:
            if given[split] is not None and not definitions.keys() >= set(wanted):
                definitions = made_definitions(load_records(data, split)) | definitions
        if new := [task for task in wanted if task in definitions and task not in made]:
            say(f"{len(new)} tasks that the training does not know are defined by {HOW_MADE}")
    if missing := [task for task in wanted if task not in definitions]:
        more = f" and {len(missing) - _NAMED} more" if missing[_NAMED:] else ""
        place = f"add them to {path}, by the records' task_name"
        if path is None:
            place = f"give data.metadata=<file> with them; {_FORMS}"
        raise UserError(
            f"routing=task reads a definition of each task, and {len(missing)} of {len(wanted)} tasks have none "
            f"({', '.join(map(cut, missing[:_NAMED]))}{more}): {place}"
        )
    return {task: definitions[task] for task in wanted}


def parse_definitions(raw: Any, source: str) -> dict[str, str]:
    """Definition of each task.

    Args:
        raw: decoded JSON: `{task: {"definition": str, ...}}`, `{task: str}` (what the code published with the paper
            holds for Vision-Flan), or `[{"task_name": str, "definition": str, ...}]`; `description` and `instruction`
            are read where there is no `definition`.
        source: where it comes from, for messages.

    Raises:
        UserError: it has another form, or a task has no definition or several.
    """
    if isinstance(raw, Mapping):
        return {str(task): _checked(entry, str(task), source) for task, entry in raw.items()}
    if not isinstance(raw, list) or not any(map(_text, raw)):
        what = f"a {type(raw).__name__}"
        if isinstance(raw, list):
            # Vision-Flan's published metadata.json is such a file: its training records once more.
            records = any(isinstance(entry, Mapping) and "conversations" in entry for entry in raw)
            noun = "training records" if records else "entries"
            what = f"a list of {len(raw)} {noun} without any definition"
        raise UserError(f"{source}: expected an object of task names, got {what}; {_FORMS}")
    definitions: dict[str, str] = {}
    for position, entry in enumerate(raw):
        keys = entry if isinstance(entry, Mapping) else {}
        task = next((keys[key] for key in TASK_KEYS if key in keys), None)
        if not isinstance(task, str):
            raise UserError(
                f"{source}: entry {position} names no task; expected one of {', '.join(TASK_KEYS)}"
            )
        text = _checked(entry, task, source)
        if definitions.setdefault(task, text) != text:
            raise UserError(f"{source}: task {cut(task)} has two different definitions; expected one")
    return definitions


def _text(entry: Any) -> str | None:
    """The first text that defines a task; None without one."""
    texts = [entry]
    if isinstance(entry, Mapping):
        texts = [entry[key] for key in TEXT_KEYS if key in entry]
    return next((text for text in texts if isinstance(text, str) and text.strip()), None)


def _checked(entry: Any, task: str, source: str) -> str:
    text = _text(entry)
    if text is None:
        raise UserError(f"{source}: task {cut(task)} has no text in 'definition'")
    return text
