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
    """Path of a record's picture inside the image folder; "" without a picture."""
    if record.image is None:
        return ""
    return record.image.name if images is None else os.path.relpath(record.image, images)


def records_digest(records: Sequence[Record], images: Path | None) -> str:
    """Of every record's place, conversation and reference answers, and its picture's path and size in bytes."""

    def content(record: Record) -> bytes:
        turns = [(turn.role, turn.text) for turn in record.conversation]
        size = 0 if record.image is None else (stamp(record.image) or (0, 0))[0]
        image = (relative_image(record, images), size)
        return json.dumps(
            [record.index, record.task, turns, image, dict(record.extra)], sort_keys=True
        ).encode()

    return _digest(map(content, records))


def prompt_digest(base: LoadedModel) -> str:
    """Of the conversation template and the number of image tokens."""
    return _digest(
        [json.dumps(asdict(base.template), sort_keys=True).encode(), str(base.num_image_tokens).encode()]
    )
