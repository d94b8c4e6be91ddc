"""A benchmark's rows, one at a time: from the hub, from parquet files, from a saved data set, from JSON lines.

The library `datasets` reads all but the last; pictures stay encoded, as {"bytes", "path"}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora_cli.data.images import stamp
from mixlora_cli.data.text_files import numbered_lines, parse_json, read_text
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.sources.files import parquet_files
from mixlora_cli.evaluation.sources.origin import Origin, Row


@dataclass(frozen=True)
class Table:
    """Rows that may be gone through once, and what tells that they are the same as last time."""

    rows: Iterable[Row]
    identity: str
    described: str
    """Where they come from, for the results."""


def from_hub(origin: Origin, benchmark: str) -> Table:
    """The split on the hub, under the first of its names that answers; kept in the library's own cache.

    Raises UserError with the reason when none does, and how to go without the hub.
    """
    import datasets

    reasons = []
    for name in origin.hub:
        try:
            data = datasets.load_dataset(name, split=origin.split, revision=origin.revision)
        except Exception as error:  # the library raises what its HTTP client, its parsers and the hub raise
            reasons.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        files = [Path(entry["filename"]) for entry in data.cache_files]
        described = f"hub:{name}@{origin.revision or 'newest'} {origin.split}, commit {_commit(files)}"
        return Table(_checked(data, origin, benchmark), _stamps(files), described)
    raise UserError(
        f"{benchmark} cannot be fetched ({'; '.join(reasons)}); fetch it where there is a network "
        f"(`hf download --repo-type dataset {origin.hub[0]}`) and give eval.sources={{{benchmark}: <folder>}}"
    )


def from_local(place: Path, origin: Origin, benchmark: str) -> Table:
    """Parquet files as on the hub, or a folder that `datasets` saved. Raises UserError when it is neither."""
    import datasets

    key = f"eval.sources.{benchmark}"
    if place.is_dir() and (place / "dataset_dict.json").is_file():
        if not (place / origin.split).is_dir():
            raise UserError(f"{key}={place} is partial: a saved data set without its {origin.split} split")
        place = place / origin.split
    if place.is_dir() and (place / "state.json").is_file():
        data = datasets.load_from_disk(str(place))
        return Table(_checked(data, origin, benchmark), _stamps(sorted(place.glob("*.arrow"))), str(place))
    files = parquet_files(place, origin.split, key)
    try:
        data = datasets.load_dataset(
            "parquet", data_files=[str(file) for file in files], split="train", streaming=True
        )
        table = _checked(data, origin, benchmark)
    except UserError:
        raise
    except Exception as error:  # pyarrow's and datasets' own
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{key}: {files[0]} cannot be read ({reason}); fetch it again") from error
    return Table(table, _stamps(files), str(place))


def from_lines(path: Path, origin: Origin, benchmark: str) -> Table:
    """JSON lines. Raises UserError for a line that is no object or lacks a column."""
    rows = (row for _, row in json_lines(path, origin.columns, benchmark))
    return Table(rows, _stamps([path]), str(path))


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
