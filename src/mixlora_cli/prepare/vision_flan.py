"""`mixlora prepare data=vision_flan`: annotation, metadata and picture archive to a folder that training reads.

Each part is written beside its place and renamed, the manifest last: a preparation that was stopped goes on where it
was and never looks complete. See `mixlora_cli.data.loading` for the folder.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mixlora_cli.config.prepare import PrepareConfig
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
from mixlora_cli.data.records import Record, parse_record, read_annotations
from mixlora_cli.errors import UserError
from mixlora_cli.prepare.definitions import Definitions, find_definitions
from mixlora_cli.prepare.vision_flan_files import unpack, write_json, write_records
from mixlora_cli.prepare.vision_flan_source import SourceFiles, find_source
from mixlora_cli.progress import with_bar


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
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    root = prepared_root(data) if options.output is None else Path(options.output).expanduser()
    settings = {
        "source": options.vision_flan,
        "revision": options.revision,
        "unpack": options.unpack,
        "max_per_task": data.max_per_task,
        "seed": config.seed,
        "on_error": data.on_error,
    }
    if not options.overwrite and _is_done(root, settings):
        console.print(f"{root} is prepared already")
        return root
    if options.overwrite:
        _clear(root)
    source = find_source(options.vision_flan, options.revision)
    records = _read(source, data.on_error, console)
    if data.max_per_task is not None:
        records = sample_per_task(records, data.max_per_task, config.seed)
    root.mkdir(parents=True, exist_ok=True)
    images = unpack(records, source.images, root, console) if options.unpack else source.images
    write_records(records, source.images, root)
    definitions = find_definitions(records, source.metadata)
    write_json(definitions, root / DEFINITIONS)
    summary = _summary(records, definitions)
    place = None if options.unpack else str(images)  # pictures in the folder itself move with it
    write_json(
        {"format": FORMAT, "images": place, "settings": settings, "files": source.stamps, **summary},
        root / MANIFEST,
    )
    _report(summary, console)
    return root


def _is_done(root: Path, settings: dict[str, Any]) -> bool:
    """Whether this very preparation has ended in `root`. Raises UserError when another one has."""
    manifest = read_manifest(root)
    if manifest is None:
        return False
    before = manifest["settings"]
    changed = [
        f"{key} (was {before.get(key)}, now {settings[key]})"
        for key in settings
        if before.get(key) != settings[key]
    ]
    folder = Path(str(settings["source"])).expanduser()
    files = manifest["files"]
    if not changed and folder.is_dir():
        changed = [
            f"{name} in {folder} has changed"
            for name, (size, time) in files.items()
            if (folder / name).is_file()
            and [size, time] != [(folder / name).stat().st_size, (folder / name).stat().st_mtime_ns]
        ]
    if changed:
        raise UserError(
            f"{root} was prepared otherwise: {', '.join(changed)}; prepare.overwrite=true replaces it, "
            "prepare.output=<folder> prepares a second one (train with data.root=<folder>)"
        )
    return True


def _clear(root: Path) -> None:
    """Remove an earlier preparation, its mark of completeness first."""
    for name in (MANIFEST, DEFINITIONS):
        (root / name).unlink(missing_ok=True)
    for name in (RECORDS, IMAGES):
        shutil.rmtree(root / name, ignore_errors=True)


def _read(source: SourceFiles, on_error: Any, console: Console) -> list[Record]:
    """All good records of the annotation file, whose pictures are there (they are not opened)."""
    raws, problems = read_annotations(source.annotations)
    for problem in problems:
        if problem.kind is Kind.CUT_SHORT:  # a partial file, whatever on_error says: records are lacking
            raise UserError(
                f"{source.annotations}: cut short: {problem.detail}; finish the download and try again"
            )
    records: list[Record] = []
    bar = with_bar(raws, "reading records", console)
    for index, raw in bar:
        try:
            records.append(parse_record(index, raw, source.images))
        except BadRecord as bad:
            problems.append(Problem(index, bad.kind, bad.detail))
    settle(problems, str(source.annotations), len(raws), on_error)
    if not records:
        raise UserError(f"{source.annotations}: no usable record; expected at least one")
    return records


def _summary(records: Sequence[Record], definitions: Definitions) -> dict[str, Any]:
    tasks = Counter(record.task for record in records)
    origins = Counter(entry["origin"] for entry in definitions.values())
    return {
        "records": len(records),
        "tasks": dict(sorted(tasks.items())),
        "text_only": sum(record.image is None for record in records),
        "pictures": len({record.image for record in records if record.image is not None}),
        "definitions": {"metadata": origins["metadata"], "questions": origins["questions"]},
        "undefined_tasks": sorted(set(tasks) - set(definitions)),
    }


def _report(summary: dict[str, Any], console: Console) -> None:
    origins, undefined = summary["definitions"], summary["undefined_tasks"]
    console.print(
        f"{summary['records']:,} records of {len(summary['tasks'])} tasks, {summary['pictures']:,} pictures, "
        f"{summary['text_only']} records without one; definitions of {origins['metadata']} tasks from the metadata, "
        f"of {origins['questions']} from what their questions have in common, none for {len(undefined)}"
    )
