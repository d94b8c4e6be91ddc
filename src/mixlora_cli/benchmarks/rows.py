"""A benchmark's rows, one at a time: from the hub, from parquet files, from a saved data set, from JSON lines.

The library `datasets` reads all but the last; pictures stay encoded, as {"bytes", "path"}. A local copy that is
missing, another benchmark's, or only a part of one is told apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora_cli.benchmarks.benchmark import Origin, Row
from mixlora_cli.data.images import stamp
from mixlora_cli.data.text_files import numbered_lines, parse_json, read_text
from mixlora_cli.errors import UserError
from mixlora_cli.store import is_lfs_pointer

_SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_PART = re.compile(r"(?P<split>[A-Za-z]+)-(?P<number>\d+)-of-(?P<count>\d+)")
_SHOWN = 5


@dataclass(frozen=True)
class Rows:
    """Rows that may be gone through once, and what tells that they are the same as last time."""

    rows: Iterable[Row]
    identity: str
    described: str
    """Where they come from, for the results."""


def from_hub(origin: Origin, benchmark: str) -> Rows:
    """The split on the hub, under the first of its names that answers; kept in the library's own cache.

    Raises UserError with the reason when none does, and how to go without the hub.
    """
    import datasets

    reasons = []
    for name in origin.hub:
        try:
            data = datasets.load_dataset(name, split=origin.split, revision=origin.revision)
        except Exception as error:  # the library raises what its HTTP client, its parsers and the hub raise
            reasons.append(f"{name}: {type(error).__name__}: {_first_words(error)}")
            continue
        files = [Path(entry["filename"]) for entry in data.cache_files]
        described = f"hub:{name}@{origin.revision or 'newest'} {origin.split}, commit {_commit(files)}"
        return Rows(_checked(data, origin, benchmark), _stamps(files), described)
    raise UserError(
        f"{benchmark} cannot be fetched ({'; '.join(reasons)}); fetch it where there is a network "
        f"(`hf download --repo-type dataset {origin.hub[0]}`) and give eval.sources={{{benchmark}: <folder>}}"
    )


def from_local(place: Path, origin: Origin, benchmark: str) -> Rows:
    """Parquet files as on the hub, or a folder that `datasets` saved. Raises UserError when it is neither."""
    import datasets

    key = f"eval.sources.{benchmark}"
    if (place / "dataset_dict.json").is_file():
        if not (place / origin.split).is_dir():
            raise UserError(f"{key}={place} is partial: a saved data set without its {origin.split} split")
        place = place / origin.split
    if (place / "state.json").is_file():
        data = datasets.load_from_disk(str(place))
        return Rows(_checked(data, origin, benchmark), _stamps(sorted(place.glob("*.arrow"))), str(place))
    files = _parquet_files(place, origin.split, key)
    try:
        data = datasets.load_dataset(
            "parquet", data_files=[str(file) for file in files], split="train", streaming=True
        )
        rows = _checked(data, origin, benchmark)
    except UserError:
        raise
    except Exception as error:  # pyarrow's and datasets' own
        raise UserError(
            f"{key}: {files[0]} cannot be read ({_first_words(error)}); fetch it again"
        ) from error
    return Rows(rows, _stamps(files), str(place))


def from_lines(path: Path, origin: Origin, benchmark: str) -> Rows:
    """JSON lines. Raises UserError for a line that is no object or lacks a column."""
    rows = (row for _, row in json_lines(path, origin.columns, benchmark))
    return Rows(rows, _stamps([path]), str(path))


def json_lines(path: Path, columns: Iterable[str], benchmark: str) -> Iterator[tuple[int, Row]]:
    """Rows of JSON lines with their line numbers from 1.

    Raises UserError for a line that is no object or lacks a column.
    """
    for number, line in numbered_lines(read_text(path, "JSON lines")):
        where = f"{path}, line {number}"
        try:
            row = parse_json(line, where)
        except json.JSONDecodeError:
            raise UserError(f"{where} is not JSON: was the file cut short? Fetch it again") from None
        lacking = [name for name in columns if name not in row] if isinstance(row, dict) else list(columns)
        if lacking:
            raise UserError(f"{where} is no row of {benchmark}: it lacks {lacking[0]}")
        yield number, row


def _checked(data: Any, origin: Origin, benchmark: str) -> Any:
    """The data set with its pictures left encoded. Raises UserError when its columns or labels are others."""
    import datasets

    features: Mapping[str, Any] = data.features or {}
    if lacking := [name for name in origin.columns if name not in features]:
        raise UserError(
            f"this is not {benchmark}: its rows lack {', '.join(lacking)}; they have {', '.join(features)}"
        )
    if origin.label_column and isinstance(label := features[origin.label_column], datasets.ClassLabel):
        names = tuple(origin.aliases.get(name, name).replace("_", " ") for name in map(str, label.names))
        if names != origin.labels:
            raise UserError(
                f"this is not {benchmark}: column {origin.label_column} has the labels {', '.join(names[:5])} ..., "
                f"expected {', '.join(origin.labels[:5])} ..."
            )
    if isinstance(features.get(origin.picture), datasets.Image):
        data = data.cast_column(origin.picture, datasets.Image(decode=False))
    return data


def _commit(files: Iterable[Path]) -> str:
    """The commit that a split of the hub was read at: the library's cache has a folder for each, named by it.

    "unknown" where the files are elsewhere, as those that older versions of the library wrote.
    """
    found = {file.parent.name for file in files if re.fullmatch("[0-9a-f]{40}", file.parent.name)}
    return found.pop() if len(found) == 1 else "unknown"


def _stamps(files: Iterable[Path]) -> str:
    return json.dumps([(str(file), stamp(file)) for file in files])


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _parquet_files(place: Path, split: str, key: str) -> list[Path]:
    """The parquet files of `split`: one file, or those of a folder laid out as on the hub, in order.

    Raises UserError when there are none (and says what is there), when parts are missing, when several folders
    have the split, or when a file is only the pointer that Git leaves without LFS.
    """
    found = [place] if place.is_file() else _of_split(place, split, key)
    for file in found:
        if is_lfs_pointer(file):
            raise UserError(
                f"{key}: {file} is a Git LFS pointer, not the data; run `git lfs pull` in its folder"
            )
        with file.open("rb") as stream:
            if stream.read(4) != b"PAR1":
                raise UserError(f"{key}: {file} is no parquet file or was cut short; fetch it again")
    return found


def _of_split(folder: Path, split: str, key: str) -> list[Path]:
    every = sorted(folder.rglob("*.parquet"))
    found = [path for path in every if re.fullmatch(rf"{split}(-.*)?", path.stem)]
    if not found and len(every) == 1 and not every[0].stem.startswith(_SPLITS):
        found = every  # a lone file that names no split
    if not found:
        there = [str(path.relative_to(folder)) for path in every or sorted(folder.iterdir())[:_SHOWN]]
        raise UserError(
            f"{key}={folder} is another folder: expected {split}-00000-of-00001.parquet or the like in it, "
            f"it has {_listed(there)}"
        )
    if len(folders := sorted({path.parent for path in found})) > 1:
        raise UserError(
            f"{key}={folder}: {len(folders)} of its folders have a {split} split; name one of "
            + _listed([str(path) for path in folders])
        )
    if numbered := [match for path in found if (match := _PART.match(path.stem))]:
        count = int(numbered[0]["count"])
        if missing := sorted(set(range(count)) - {int(match["number"]) for match in numbered}):
            raise UserError(
                f"{key}={found[0].parent} is partial: {count - len(missing)} of {count} parts of the {split} split "
                f"are there, {split}-{missing[0]:05d}-of-{count:05d} is the first missing; fetch the rest"
            )
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more
