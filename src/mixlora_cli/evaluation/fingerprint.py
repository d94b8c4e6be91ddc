"""What an answer depends on, as digests: old predictions are continued only where all of it is unchanged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from mixlora_cli.data.images import stamp
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.models.load import LoadedModel

_CHUNK = 1 << 20


def _digest(parts: Iterable[bytes]) -> str:
    """Each part goes in with its length, so that moving bytes from one to the next changes the digest."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:16]


def adapter_digest(folder: Path | None) -> str:
    """Of the names and contents of an adapter's files, its model card aside; "none" without an adapter."""
    if folder is None:
        return "none"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md"):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def relative_image(record: Record, images: Path | None) -> str:
    """Path of a record's first picture inside the image folder; "" without a picture."""
    return _relative(record.files[0], images) if record.files else ""


def _relative(path: Path, images: Path | None) -> str:
    name = path.name if images is None else os.path.relpath(path, images)
    return (
        path.name if name.startswith("..") else name
    )  # it was in the record, and lies in the cache by its digest


def records_digest(records: Sequence[Record], images: Path | None) -> str:
    """Of every record's place, conversation and reference answers, and its pictures' paths and sizes in bytes."""

    def content(record: Record) -> bytes:
        # as in the data: a marker that was added is not of it
        added = f"{IMAGE_MARKER}\n" * record.num_added
        turns = [(turn.role, turn.text.removeprefix(added)) for turn in record.conversation]
        pictures = [(_relative(path, images), (stamp(path) or (0, 0))[0]) for path in record.files]
        # one picture, or none, as in the digests of kept answers
        told = pictures if len(pictures) > 1 else pictures[0] if pictures else ("", 0)
        return json.dumps(
            [record.index, record.task, turns, told, dict(record.extra)], sort_keys=True, default=str
        ).encode()

    return _digest(map(content, records))


def prompt_digest(base: LoadedModel) -> str:
    """Of the chat template and of what stands in a text for a picture."""
    chat = base.chat
    about = {**asdict(chat.template), "name": None, "picture": chat.probe}
    return _digest([json.dumps(about, sort_keys=True).encode()])
