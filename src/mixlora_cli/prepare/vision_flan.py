"""`mixlora prepare data=vision_flan`: annotation, metadata and picture archive to a folder that training reads.

Each part is written beside its place and renamed, the manifest last: a preparation that was stopped goes on where it
was and never looks complete. See `mixlora_cli.data.loading` for the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mixlora_cli.config import PrepareConfig
from mixlora_cli.data.definitions import parse_definitions
from mixlora_cli.data.images import read_picture, stamp
from mixlora_cli.data.loading import (
    DEFINITIONS,
    FORMAT,
    IMAGES,
    MANIFEST,
    RECORDS,
    prepared_root,
    read_manifest,
    sample_per_task,
)
from mixlora_cli.data.problems import BadRecord, Kind, Problem, settle
from mixlora_cli.data.records import Record, parse_record
from mixlora_cli.data.sources import read_annotations
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.data.text_files import read_json
from mixlora_cli.errors import UserError, cut
from mixlora_cli.output import require_writable
from mixlora_cli.prepare.parts import find_part, require_space
from mixlora_cli.progress import say, with_bar
from mixlora_cli.store import is_lfs_pointer, publish_folder, sync_files, temp_of, write_json

ANNOTATIONS = "annotation_191-task_1k.json"
METADATA = "metadata.json"
ARCHIVE = "image_191-task_1k.zip"
FILES = (ANNOTATIONS, METADATA, ARCHIVE)
INNER_FOLDER = "images_191task_1k"
_KEY = "prepare.vision_flan"
MIN_WORDS = 4
"""A shorter common beginning ("What is the") is an accident, not an instruction."""
MIN_QUESTIONS = 2
"""The only question of a task begins like itself; that says nothing about the task."""
_SENTENCE_END = re.compile(r"[.!?:](?=\s)|\n")

Definitions = dict[str, dict[str, str]]
"""{task: {"definition": text, "origin": "metadata" or "questions"}}"""


def prepare_vision_flan(config: PrepareConfig) -> Path:
    """Prepare the records and return their folder; what an earlier call finished is left alone.

    Raises:
        UserError: `data` is another group option, the source is missing, partial or damaged, records are bad and
            `data.on_error` is "stop", the disk is too small, or the folder was prepared with other settings.
    """
    data, options = config.data, config.prepare
    if data is None or data.source != "vision_flan":
        name = None if data is None else data.name
        raise UserError(f"data={name}: needs no preparation; only data=vision_flan does")
    root = prepared_root(data) if options.output is None else Path(options.output).expanduser()
    settings = {
        "source": options.vision_flan,
        "revision": options.revision,
        "unpack": options.unpack,
        "max_per_task": data.max_per_task,
        "seed": config.seed,
        "on_error": data.on_error,
    }
    if options.overwrite:
        (root / MANIFEST).unlink(missing_ok=True)  # first, it is the mark of completeness
        shutil.rmtree(root / IMAGES, ignore_errors=True)
    elif _is_done(root, settings):
        say(f"{root} is prepared already")
        return root
    require_writable(root, "prepare.output" if options.output else "data.root")
    source = open_source(find_part(_KEY, options.vision_flan, FILES, options.revision, "dataset").path)
    records = _read_records(source, data.on_error)
    if data.max_per_task is not None:
        records = sample_per_task(records, data.max_per_task, config.seed)
    root.mkdir(parents=True, exist_ok=True)
    names = [
        record.files[0].relative_to(source.images).as_posix() if record.files else None for record in records
    ]  # no record of Vision-Flan has several
    if options.unpack:
        _unpack(names, source.images, root)
    _write_records(records, names, root)
    definitions = find_definitions(records, source.metadata)
    write_json(root / DEFINITIONS, definitions)
    tasks = Counter(record.task for record in records)
    origins = Counter(entry["origin"] for entry in definitions.values())
    undefined = sorted(set(tasks) - set(definitions))
    pictures = len(set(names) - {None})
    manifest = {
        "format": FORMAT,
        "images": None if options.unpack else str(source.images),  # those in the folder itself move with it
        "settings": settings,
        "files": source.stamps,
        "records": len(records),
        "tasks": dict(sorted(tasks.items())),
        "text_only": names.count(None),
        "pictures": pictures,
        "definitions": {"metadata": origins["metadata"], "questions": origins["questions"]},
        "undefined_tasks": undefined,
    }
    write_json(root / MANIFEST, manifest)
    say(
        f"{len(records):,} records of {len(tasks)} tasks, {pictures:,} pictures, {names.count(None)} records without "
        f"one; definitions of {origins['metadata']} tasks from the metadata, of {origins['questions']} from what their "
        f"questions have in common, none for {len(undefined)}"
    )
    return root


def _is_done(root: Path, settings: Mapping[str, Any]) -> bool:
    """Whether this very preparation has ended in `root`. Raises UserError when another one has."""
    manifest = read_manifest(root)
    if manifest is None:
        return False
    before = manifest["settings"]
    changed = [
        f"{key} (was {before.get(key)}, now {value})"
        for key, value in settings.items()
        if before.get(key) != value
    ]
    folder = Path(str(settings["source"])).expanduser()
    if not changed:
        changed = [
            f"{name} in {folder} has changed"
            for name, known in manifest["files"].items()
            if (folder / name).is_file() and _stamp(folder / name) != known
        ]
    if changed:
        raise UserError(
            f"{root} was prepared otherwise: {', '.join(changed)}; prepare.overwrite=true replaces it, "
            "prepare.output=<folder> prepares a second one (train with data.root=<folder>)"
        )
    return True


def _stamp(file: Path) -> list[int]:
    """Size and time of change of a file, to notice that it was replaced."""
    status = file.stat()
    return [0, 0] if file.is_dir() else [status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class Source:
    """What the preparation reads."""

    annotations: Path
    metadata: Path | None
    images: Path
    """The folder of the pictures, or the folder inside the archive that holds them."""
    stamps: dict[str, list[int]]
    """Size and time of change of each file."""


def open_source(folder: Path) -> Source:
    """Vision-Flan's own files; the pictures may be unpacked in `images_191task_1k/`, the metadata may be missing.

    Raises UserError that tells a folder of something else, a partial copy and damaged files apart.
    """
    found = [name for name in (*FILES, INNER_FOLDER) if (folder / name).exists()]
    pictures = INNER_FOLDER if INNER_FOLDER in found and ARCHIVE not in found else ARCHIVE
    missing = [name for name in (ANNOTATIONS, pictures) if name not in found]
    if missing:
        unfinished = len(list(folder.rglob("*.incomplete")))
        if not found and not unfinished:
            raise UserError(
                f"{_KEY}={folder}: holds nothing of Vision-Flan; expected {', '.join(FILES)} in it"
            )
        state = f"has {', '.join(found) or 'no whole file'}, lacks {', '.join(missing)}"
        hint = f" ({unfinished} unfinished downloads lie in it)" if unfinished else ""
        raise UserError(f"{_KEY}={folder}: a partial copy: {state}{hint}; finish the download and try again")
    used = [name for name in (ANNOTATIONS, METADATA, pictures) if name in found]
    for name in used:
        if (folder / name).is_file() and is_lfs_pointer(folder / name):
            raise UserError(
                f"{folder / name}: only a Git LFS pointer; fetch the file itself with `git lfs pull`"
            )
    archive = (folder / ARCHIVE).absolute()
    return Source(
        annotations=folder / ANNOTATIONS,
        metadata=folder / METADATA if METADATA in found else None,
        images=archive / _inner_folder(archive) if pictures == ARCHIVE else (folder / pictures).resolve(),
        stamps={name: _stamp(folder / name) for name in used},
    )


def _inner_folder(archive: Path) -> str:
    """Folder inside the archive that holds the pictures.

    Raises UserError when the archive is cut short, is no zip file, or holds no pictures.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            files = [name for name in opened.namelist() if not name.endswith("/")]
    except zipfile.BadZipFile as error:
        size = archive.stat().st_size
        with archive.open("rb") as stream:
            begins_well = stream.read(4) == b"PK\x03\x04"
        if begins_well:
            raise UserError(
                f"{archive}: begins like a zip archive but is cut short at {size:,} bytes ({error}); "
                "finish the download and try again"
            ) from None
        raise UserError(f"{archive}: not a zip archive ({size:,} bytes); download it again") from None
    folders = Counter(str(PurePosixPath(name).parent) for name in files if not name.startswith("__MACOSX"))
    if not folders:
        raise UserError(f"{archive}: holds no file; expected the pictures in {INNER_FOLDER}/")
    chosen = INNER_FOLDER if INNER_FOLDER in folders else folders.most_common(1)[0][0]
    return "" if chosen == "." else chosen


def _read_records(source: Source, on_error: Any) -> list[Record]:
    """All good records of the annotation file, whose pictures are there (they are not opened)."""
    raws, problems = read_annotations(source.annotations)
    for problem in problems:
        if problem.kind is Kind.CUT_SHORT:  # a partial file, whatever on_error says: records are lacking
            raise UserError(
                f"{source.annotations}: cut short: {problem.detail}; finish the download and try again"
            )
    records: list[Record] = []
    for index, raw in with_bar(raws, "reading records"):
        try:
            records.append(parse_record(index, raw, source.images))
        except BadRecord as bad:
            problems.append(Problem(index, bad.kind, bad.detail))
    settle(problems, str(source.annotations), len(raws), on_error)
    if not records:
        raise UserError(f"{source.annotations}: no usable record; expected at least one")
    return records


def _unpack(names: Sequence[str | None], images: Path, root: Path) -> None:
    """Copy the records' pictures into `root`; those that are there complete are kept."""
    target = root / IMAGES
    sizes = {name: (stamp(images / name) or (0, 0))[0] for name in names if name is not None}
    lacking = [
        name
        for name, size in sizes.items()
        if not (target / name).is_file() or (target / name).stat().st_size != size
    ]
    require_space(root, sum(sizes[name] for name in lacking), "unpacking the pictures")
    for name in with_bar(lacking, "unpacking pictures"):
        temp = target / f"{name}.partial"
        temp.parent.mkdir(parents=True, exist_ok=True)
        try:
            temp.write_bytes(read_picture(images / name))
        except OSError as error:
            raise UserError(f"{cut(name)} cannot be unpacked to {target}: {error}") from error
        temp.replace(target / name)


def _write_records(records: Sequence[Record], names: Sequence[str | None], root: Path) -> None:
    """Write the Arrow data set."""
    from datasets import Dataset, Features, List, Value, disable_progress_bars

    size = sum(len(turn.text) for record in records for turn in record.conversation)
    require_space(root, 2 * size + 300 * len(records), "writing the records")
    text = Value("string")
    columns = {
        "id": unique_ids(names),
        "source_id": [record.id for record in records],
        "task_name": [record.task for record in records],
        "image": names,
        "conversations": [
            [{"from": turn.role, "value": turn.text} for turn in record.conversation] for record in records
        ],
    }
    features = Features(
        {name: text for name in columns} | {"conversations": List({"from": text, "value": text})}
    )
    disable_progress_bars()
    temp = temp_of(root / RECORDS)
    shutil.rmtree(temp, ignore_errors=True)
    Dataset.from_dict(columns, features=features).save_to_disk(temp)
    sync_files(temp)
    publish_folder(temp, root / RECORDS)


def unique_ids(names: Sequence[str | None]) -> list[str]:
    """An id for each record from its picture's name: "a.jpg", "a.jpg#2", ...; "text", "text#2" without a picture."""
    seen: Counter[str] = Counter()
    ids = []
    for name in names:
        key = "text" if name is None else name
        seen[key] += 1
        ids.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return ids


def find_definitions(records: Iterable[Record], metadata: Path | None) -> Definitions:
    """Definition of each task that has one: from the metadata, else what all questions of the task begin with.

    The `metadata.json` on the hub repeats the records and defines no task. But most tasks put one instruction, written
    by their annotator, in front of every question.
    """
    given: Mapping[str, str] = {}
    if metadata is not None:
        with suppress(UserError):  # of another kind: the records once more, say
            given = parse_definitions(read_json(metadata, "task definitions"), str(metadata))
    found: Definitions = {}
    for task, text in sorted(_common_beginnings(records).items()):
        if task in given:
            found[task] = {"definition": given[task], "origin": "metadata"}
        elif text:
            found[task] = {"definition": text, "origin": "questions"}
    return found


def _common_beginnings(records: Iterable[Record]) -> dict[str, str]:
    """For each task the whole sentences or lines that all its first questions begin with; "" where there are none."""
    questions: dict[str, list[str]] = {}
    for record in records:
        # The line break makes the end of a question an end that others share or do not.
        question = record.conversation[0].text.replace(IMAGE_MARKER, "").strip() + "\n"
        questions.setdefault(record.task, []).append(question)
    beginnings = {}
    for task, own in questions.items():
        shared = os.path.commonprefix(own) if len(own) >= MIN_QUESTIONS else ""  # noqa: RUF071  # texts, not paths
        ends = [match.end() for match in _SENTENCE_END.finditer(shared)]
        text = shared[: ends[-1]].strip() if ends else ""
        beginnings[task] = text if len(text.split()) >= MIN_WORDS else ""
    return beginnings
