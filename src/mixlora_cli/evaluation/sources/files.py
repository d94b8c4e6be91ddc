"""Find a benchmark's files in a local copy; a missing copy, a wrong one and a partial one are told apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mixlora_cli.errors import UserError

SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_PART = re.compile(r"(?P<split>[A-Za-z]+)-(?P<number>\d+)-of-(?P<count>\d+)")
_POINTER = b"version https://git-lfs"
_SHOWN = 5


def existing(path: str, key: str, expected: str) -> Path:
    """The path that `key` names, "~" expanded. Raises UserError when nothing is there."""
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{key}={path}: no such file or folder; expected {expected}")
    return place


def parquet_files(place: Path, split: str, key: str) -> list[Path]:
    """The parquet files of `split`: one file, or those of a folder laid out as on the hub, in order.

    Raises UserError when there are none (and says what is there), when parts are missing, when several folders
    have the split, or when a file is only the pointer that Git leaves without LFS.
    """
    found = [place] if place.is_file() else _of_split(place, split, key)
    for file in found:
        with file.open("rb") as stream:
            start = stream.read(len(_POINTER))
        if start == _POINTER:
            raise UserError(
                f"{key}: {file} is a Git LFS pointer, not the data; run `git lfs pull` in its folder"
            )
        if start[:4] != b"PAR1":
            raise UserError(f"{key}: {file} is no parquet file or was cut short; fetch it again")
    return found


def _of_split(folder: Path, split: str, key: str) -> list[Path]:
    every = sorted(folder.rglob("*.parquet"))
    found = [path for path in every if re.fullmatch(rf"{split}(-.*)?", path.stem)]
    if not found and len(every) == 1 and not every[0].stem.startswith(SPLITS):
        found = every  # a lone file that names no split
    if not found:
        there = [
            str(path.relative_to(folder)) for path in every or sorted(p for p in folder.iterdir())[:_SHOWN]
        ]
        raise UserError(
            f"{key}={folder} is another folder: expected {split}-00000-of-00001.parquet or the like in it, "
            f"it has {_listed(there)}"
        )
    if len(folders := sorted({path.parent for path in found})) > 1:
        raise UserError(
            f"{key}={folder}: {len(folders)} of its folders have a {split} split; name one of "
            + _listed([str(path) for path in folders])
        )
    _check_parts(found, split, key)
    return found


def _check_parts(files: Sequence[Path], split: str, key: str) -> None:
    numbered = [match for path in files if (match := _PART.match(path.stem))]
    if not numbered:
        return
    count = int(numbered[0]["count"])
    missing = sorted(set(range(count)) - {int(match["number"]) for match in numbered})
    if missing:
        raise UserError(
            f"{key}={files[0].parent} is partial: {count - len(missing)} of {count} parts of the {split} split are "
            f"there, {split}-{missing[0]:05d}-of-{count:05d} is the first missing; fetch the rest"
        )


def records_file(place: Path, name: str, key: str) -> Path | None:
    """The JSON lines file `name` in a folder, or `place` itself where it is a file; None where there is none."""
    if place.is_file():
        if place.suffix not in (".jsonl", ".json"):
            raise UserError(f"{key}={place}: expected a folder with {name}, or that file")
        return place
    return next((path for path in (place / name, place / "data" / name) if path.is_file()), None)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more
