"""What a preparation of Vision-Flan writes: pictures, records, small JSON files; each whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mixlora_cli.data.images import read_picture, stamp
from mixlora_cli.data.loading import IMAGES, RECORDS
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError, cut
from mixlora_cli.prepare.disk import require_space
from mixlora_cli.progress import with_bar
from mixlora_cli.store import write_text


def unpack(records: Sequence[Record], images: Path, root: Path, console: Console) -> Path:
    """Copy the records' pictures into `root`; those that are there whole are kept."""
    target = root / IMAGES
    names = dict.fromkeys(_name(record, images) for record in records if record.image is not None)
    sizes = {name: (stamp(images / name) or (0, 0))[0] for name in names}
    lacking = [name for name in names if _size(target / name) != sizes[name]]
    require_space(root, sum(sizes[name] for name in lacking), "unpacking the pictures")
    bar = with_bar(lacking, "unpacking pictures", console)
    for name in bar:
        part = target / f"{name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(read_picture(images / name))
        except OSError as error:
            raise UserError(f"{cut(name)} cannot be unpacked to {target}: {error}") from error
        os.replace(part, target / name)
    return target


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _name(record: Record, images: Path) -> str:
    """The picture's path in the picture folder."""
    assert record.image is not None
    return record.image.relative_to(images).as_posix()


def unique_ids(names: Sequence[str | None]) -> list[str]:
    """An id for each record from its picture's name: "a.jpg", "a.jpg#2", ...; "text", "text#2" without a picture."""
    seen: Counter[str] = Counter()
    ids = []
    for name in names:
        key = "text" if name is None else name
        seen[key] += 1
        ids.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return ids


def write_records(records: Sequence[Record], images: Path, root: Path) -> None:
    """Write the Arrow data set beside its place, then rename it."""
    from datasets import Dataset, Features, List, Value, disable_progress_bars

    text = Value("string")
    names = [None if record.image is None else _name(record, images) for record in records]
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
    size = sum(len(turn.text) for record in records for turn in record.conversation)
    require_space(root, 2 * size + 300 * len(records), "writing the records")
    part = root / f"{RECORDS}.part"
    shutil.rmtree(part, ignore_errors=True)
    disable_progress_bars()
    Dataset.from_dict(columns, features=features).save_to_disk(part)
    shutil.rmtree(root / RECORDS, ignore_errors=True)
    part.rename(root / RECORDS)


def write_json(value: Any, path: Path) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
