"""Vision-Flan as `mixlora prepare data=vision_flan` leaves it, read without holding it in memory.

    <root>/records/           the records as an Arrow data set, mapped into memory when read
    <root>/definitions.json   {task: {"definition": str, "origin": "metadata" | "questions"}}
    <root>/images/            the unpacked pictures, with prepare.unpack=true
    <root>/prepared.json      what was prepared from what, written last

A row has `id` (unique: the picture's name, with a number where several records share the picture), `source_id` (the id
in the annotation file, which is not unique), `task_name`, `image` (null without a picture) and `conversations`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora_cli.config import DataConfig
from mixlora_cli.data.cache import cache_root
from mixlora_cli.data.pictures import split_archive
from mixlora_cli.errors import UserError

FORMAT = 1
"""Raise when the files of a prepared folder change their meaning."""
RECORDS, DEFINITIONS, IMAGES, MANIFEST = "records", "definitions.json", "images", "prepared.json"
COMMAND = "mixlora prepare data=vision_flan"
_ROWS = 1000  # read from Arrow at once


@dataclass(frozen=True)
class PreparedData:
    """A complete preparation."""

    root: Path
    images: Path
    """Folder of the pictures, or the folder inside the archive that holds them."""
    manifest: dict[str, Any]

    @property
    def records(self) -> Path:
        return self.root / RECORDS

    @property
    def definitions(self) -> Path:
        return self.root / DEFINITIONS


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


def open_prepared(data: DataConfig) -> PreparedData:
    """The preparation that `data` names.

    Raises UserError when there is none, it was not finished, or its pictures have gone.
    """
    root = prepared_root(data)
    manifest = read_manifest(root)
    if manifest is None:
        state = f"the preparation in {root} is not complete" if root.is_dir() else f"not prepared: no {root}"
        raise UserError(
            f"data={data.name}: {state}; run `{COMMAND}`, which goes on where it stopped (data.root=<folder> for "
            "one that is somewhere else)"
        )
    images = root / IMAGES if manifest["images"] is None else Path(manifest["images"])
    inside = split_archive(images)
    if inside is None and not images.is_dir():
        raise UserError(
            f"data={data.name}: its pictures were in {images}, which is gone; put it back, or run `{COMMAND}` with "
            "the new place and prepare.overwrite=true"
        )
    if inside is not None and not zipfile.is_zipfile(inside[0]):
        raise UserError(f"data={data.name}: {inside[0]} is no longer a whole zip archive; download it again")
    return PreparedData(root, images if inside else images.resolve(), manifest)


class ArrowRows:
    """The rows of an Arrow data set with their indices; each pass over them reads the mapped file anew."""

    def __init__(self, folder: Path) -> None:
        from datasets import load_from_disk  # slow to import, and needed here alone

        try:
            self._rows = load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder}: not a readable Arrow data set ({error}); run `{COMMAND}` again"
            ) from None

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for start in range(0, len(self._rows), _ROWS):
            columns = self._rows[start : start + _ROWS]
            for offset, values in enumerate(zip(*columns.values(), strict=True)):
                yield start + offset, dict(zip(columns, values, strict=True))
