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
import random
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixlora_cli.config import DataConfig
from mixlora_cli.data.images import check_images, split_archive
from mixlora_cli.data.problems import BadRecord, Kind, Problem, settle
from mixlora_cli.data.records import Raw, Record, names_picture, parse_record, read_annotations, task_name
from mixlora_cli.data.text_files import read_json
from mixlora_cli.errors import UserError, cut, hint_at
from mixlora_cli.paths import cache_root

Split = Literal["train", "heldout", "unseen"]

FORMAT = 1
"""Raise when the files of a prepared folder change their meaning."""
RECORDS, DEFINITIONS, IMAGES, MANIFEST = "records", "definitions.json", "images", "prepared.json"
_COMMAND = "mixlora prepare data=vision_flan"
_ROWS = 1000  # read from Arrow at once
TASK_KEYS = ("task_name", "task", "name")
TEXT_KEYS = ("definition", "description", "instruction")
_FORMS = 'write {"task name": {"definition": "..."}} or {"task name": "..."}'
_NAMED = 5  # tasks that a message lists


@dataclass(frozen=True)
class DataFiles:
    """Where one split's records, pictures and task definitions are."""

    annotations: Path
    images: Path | None
    """Folder of the pictures, or a folder inside an archive."""
    metadata: Path | None


def locate_files(data: DataConfig, split: Split) -> DataFiles:
    """Files of a split; the mini data is built on first use.

    Raises:
        UserError: the configuration names no file for the split, the image folder does not exist, or the data was not
            prepared.
    """
    if data.source == "mini":
        from mixlora_cli.data.mini.build import mini_root  # the generator is only loaded where it is used

        root = mini_root()
        return DataFiles(root / f"{split}.json", (root / "images").resolve(), root / "metadata.json")
    if data.source == "mini_text":
        from mixlora_cli.data.mini.build import mini_text_root

        root = mini_text_root()
        return DataFiles(root / f"{split}.json", None, root / "metadata.json")
    if data.source == "vision_flan" and split == "train":
        root, images = _prepared(data)
        return DataFiles(root / RECORDS, images, definitions_file(data))
    annotations = {"train": data.train, "heldout": data.heldout, "unseen": data.unseen}[split]
    if annotations is None:
        raise UserError(
            f"data.{split}=null: expected the path of a JSON annotation file (data.{split}=<file>)"
        )
    folder = None if data.images is None else Path(data.images).expanduser()
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"data.images={data.images}: no such folder; expected the folder that image paths are relative to"
        )
    metadata = None if data.metadata is None else Path(data.metadata).expanduser()
    return DataFiles(Path(annotations).expanduser(), None if folder is None else folder.resolve(), metadata)


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


class ArrowRows:
    """The rows of an Arrow data set with their indices; each pass over them reads the mapped file anew."""

    def __init__(self, folder: Path) -> None:
        from datasets import load_from_disk  # slow to import, and needed here alone

        try:
            self._rows = load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder}: not a readable Arrow data set ({error}); run `{_COMMAND}` again"
            ) from None

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Raw]:
        for start in range(0, len(self._rows), _ROWS):
            columns = self._rows[start : start + _ROWS]
            for offset, values in enumerate(zip(*columns.values(), strict=True)):
                yield start + offset, dict(zip(columns, values, strict=True))


Raws = ArrowRows | list[Raw]
"""Unchecked records of a file; may be gone through more than once."""


def read_raws(annotations: Path) -> tuple[Raws, list[Problem]]:
    """Unchecked records with their indices; those of an Arrow data set are not held in memory."""
    return (ArrowRows(annotations), []) if annotations.is_dir() else read_annotations(annotations)


def load_records(data: DataConfig, split: Split, seed: int = 0) -> list[Record]:
    """Checked records of a split, in file order.

    `data.tasks` keeps only these tasks of the seen splits; `data.max_per_task` samples the training split
    with `seed`, the same records on every machine. Texts are checked before sampling, pictures after: what is
    not used is not opened.

    Raises:
        UserError: a path or task name is wrong, nothing is left, or there are bad records and `data.on_error` is
            "stop"; with "skip" they are left out, counted and reported.
    """
    files = locate_files(data, split)
    source, images = str(files.annotations), files.images
    raws, problems = read_raws(files.annotations)
    for problem in problems:
        if problem.kind is Kind.CUT_SHORT and data.on_error == "stop":
            raise UserError(
                f"{source}: broken JSON: {problem.detail}; if the file was cut short, copy or download it again"
            )
    if images is None and any(names_picture(raw) for _, raw in raws):
        raise UserError(f"{source}: records have images, but data.images=null; pass data.images=<folder>")
    wanted = None
    if split != "unseen" and data.tasks is not None:
        _require_tasks(data.tasks, raws, source)
        wanted = set(data.tasks)
    records: list[Record] = []
    for index, raw in raws:
        try:
            if wanted is None or task_name(raw) in wanted:
                records.append(parse_record(index, raw, images))
        except BadRecord as bad:
            problems.append(Problem(index, bad.kind, bad.detail))
    if split == "train" and data.max_per_task is not None:
        records = sample_per_task(records, data.max_per_task, seed)
    good = records
    if images is not None:
        broken = check_images((path for each in records for path in each.files), images, cache_root())
        good = []
        for record in records:
            wrong = next((broken[path] for path in record.files if path in broken), None)
            if wrong is None:
                good.append(record)
            else:
                problems.append(Problem(record.index, wrong.kind, wrong.detail))
    settle(problems, source, len(good) + len(problems), data.on_error)
    if not good:
        raise UserError(f"{source}: no usable record; expected at least one")
    return good


def _require_tasks(tasks: Sequence[str], raws: Raws, source: str) -> None:
    known = set()
    for _, raw in raws:
        try:
            known.add(task_name(raw))
        except BadRecord:
            continue  # counted when the record is parsed
    for task in tasks:
        if task not in known:
            raise UserError(
                f"data.tasks={cut(task)}: no such task in {source}; {hint_at(task, known, 'tasks')}"
            )


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


def definitions_of(data: DataConfig, tasks: Iterable[str]) -> dict[str, str]:
    """Definitions of exactly these tasks.

    Raises:
        UserError: some task has none; names those tasks and the file that should hold them.
    """
    definitions, path = load_definitions(data), definitions_file(data)
    wanted = list(dict.fromkeys(tasks))
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
