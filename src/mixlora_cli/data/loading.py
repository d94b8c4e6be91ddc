"""From the data's configuration to checked records: everything that is wrong is found before a model is
loaded.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixlora_cli.config import DataConfig
from mixlora_cli.data.cache import cache_root
from mixlora_cli.data.definitions import parse_definitions, require_definitions
from mixlora_cli.data.images import check_images
from mixlora_cli.data.problems import BadRecord, Kind, Problem, settle
from mixlora_cli.data.records import Record, names_picture, parse_record, read_annotations, task_name
from mixlora_cli.data.text_files import read_json
from mixlora_cli.data.vision_flan import ArrowRows, open_prepared
from mixlora_cli.errors import UserError, cut, hint_at

Split = Literal["train", "heldout", "unseen"]
Raws = ArrowRows | list[tuple[int, Any]]
"""Unchecked records of a file, with their indices; may be gone through more than once."""


@dataclass(frozen=True)
class DataFiles:
    """Where one split's records, pictures and task definitions are."""

    annotations: Path
    images: Path | None
    metadata: Path | None


def locate_files(data: DataConfig, split: Split) -> DataFiles:
    """Files of a split. Builds the mini data on first use.

    Raises UserError when the configuration names no file for the split or the image folder does not exist.
    """
    if data.source == "mini":
        from mixlora_cli.data.mini.build import mini_root  # the generator is only loaded where it is used

        root = mini_root()
        return DataFiles(root / f"{split}.json", (root / "images").resolve(), root / "metadata.json")
    if data.source == "vision_flan" and split == "train":
        prepared = open_prepared(data)
        return DataFiles(prepared.records, prepared.images, _metadata(data))
    paths = {"train": data.train, "heldout": data.heldout, "unseen": data.unseen}
    annotations = paths[split]
    if annotations is None:
        raise UserError(
            f"data.{split}=null: expected the path of a JSON annotation file (data.{split}=<file>)"
        )
    images = None if data.images is None else Path(data.images).expanduser()
    if images is not None and not images.is_dir():
        raise UserError(
            f"data.images={data.images}: no such folder; expected the folder that image paths are relative to"
        )
    metadata = None if data.metadata is None else Path(data.metadata).expanduser()
    return DataFiles(Path(annotations).expanduser(), None if images is None else images.resolve(), metadata)


def load_records(data: DataConfig, split: Split, seed: int = 0) -> list[Record]:
    """Checked records of a split, in file order.

    `data.tasks` keeps only these tasks of the seen splits; `data.max_per_task` samples the training split
    with `seed`, the same records on every machine. Texts are checked before sampling, pictures after: what is
    not used is not opened.

    Raises UserError when a path or task name is wrong, when nothing is left, and for bad records if
    `data.on_error` is "stop"; with "skip" they are left out, counted and reported.
    """
    files = locate_files(data, split)
    raws, problems = read_raws(files.annotations)
    source = str(files.annotations)
    if data.on_error == "stop":
        for problem in problems:
            if problem.kind is Kind.CUT_SHORT:
                raise UserError(
                    f"{source}: broken JSON: {problem.detail}; if the file was cut short, "
                    "copy or download it again"
                )
    if files.images is None and any(names_picture(raw) for _, raw in raws):
        raise UserError(f"{source}: records have images, but data.images=null; pass data.images=<folder>")
    wanted = None if split == "unseen" else _wanted_tasks(data.tasks, raws, source)
    records = _parse_all(raws, wanted, files.images, problems)
    if split == "train" and data.max_per_task is not None:
        records = sample_per_task(records, data.max_per_task, seed)
    records = _with_good_images(records, files.images, problems)
    settle(problems, source, len(records) + len(problems), data.on_error)
    if not records:
        raise UserError(f"{source}: no usable record; expected at least one")
    return records


def read_raws(annotations: Path) -> tuple[Raws, list[Problem]]:
    """Unchecked records with their indices; those of an Arrow data set are not held in memory."""
    return (ArrowRows(annotations), []) if annotations.is_dir() else read_annotations(annotations)


def load_definitions(data: DataConfig) -> dict[str, str]:
    """Definition of each task, read from `data.metadata`; see `parse_definitions` for the forms it may have.

    Empty when the configuration names no metadata file. Raises UserError when the file cannot be read as
    such.
    """
    path = _metadata(data)
    if path is None:
        return {}
    source = f"data.metadata={path}"
    return parse_definitions(read_json(path, "a JSON file of task definitions", source), source)


def definitions_of(data: DataConfig, tasks: Iterable[str]) -> dict[str, str]:
    """Definitions of exactly these tasks. Raises UserError that names the tasks without one and the file."""
    path = _metadata(data)
    return require_definitions(tasks, load_definitions(data), None if path is None else str(path))


def _metadata(data: DataConfig) -> Path | None:
    if data.source == "mini":
        return locate_files(data, "train").metadata
    if data.source == "vision_flan" and data.metadata is None:
        return open_prepared(data).definitions
    return None if data.metadata is None else Path(data.metadata).expanduser()


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


def _wanted_tasks(
    tasks: Sequence[str] | None, raws: Iterable[tuple[int, Any]], source: str
) -> set[str] | None:
    """Names of `data.tasks`, each known to the file."""
    if tasks is None:
        return None
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
    return set(tasks)


def _parse_all(
    raws: Iterable[tuple[int, Any]], wanted: set[str] | None, images: Path | None, problems: list[Problem]
) -> list[Record]:
    records = []
    for index, raw in raws:
        try:
            if wanted is None or task_name(raw) in wanted:
                records.append(parse_record(index, raw, images))
        except BadRecord as bad:
            problems.append(Problem(index, bad.kind, bad.detail))
    return records


def _with_good_images(
    records: Sequence[Record], images: Path | None, problems: list[Problem]
) -> list[Record]:
    if images is None:
        return list(records)
    bad = check_images((record.image for record in records if record.image is not None), images, cache_root())
    good = []
    for record in records:
        if record.image in bad:
            problems.append(Problem(record.index, bad[record.image].kind, bad[record.image].detail))
        else:
            good.append(record)
    return good
