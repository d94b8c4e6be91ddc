#!/usr/bin/env python3
"""Answers of many evaluations in one file, as git keeps them: they share their questions, which are kept once.

    scripts/pack_predictions.py pack results/mini      every predictions.jsonl below it into results/mini/cells.parquet
    scripts/pack_predictions.py unpack results/mini    and back, byte by byte (`mixlora table`, compare_grids.py)

`cells.parquet` has a row for each line: `file`, `instance` (the line without its answer) and `prediction`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NAME, PACKED = "predictions.jsonl", "cells.parquet"
ANSWER = "prediction"
_HERE = "\0"
"""Stands in an instance for its answer."""

Row = tuple[str, str, str | None]


def pack(folder: Path) -> int:
    """Write `cells.parquet` and delete the files that are in it; returns how many.

    Raises:
        ValueError: a line would not come back as it is.
    """
    files = sorted(folder.rglob(NAME))
    rows: list[Row] = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        lines = file.read_text(encoding="utf-8").splitlines()
        own = [(name, *_taken_apart(line)) for line in lines]
        if "".join(f"{line}\n" for line in _joined(own)) != file.read_text(encoding="utf-8"):
            raise ValueError(f"{file}: does not come back byte by byte; was it written by mixlora?")
        rows += own
    columns = [pa.array(column, pa.string()).dictionary_encode() for column in zip(*rows, strict=True)]
    table = pa.table(dict(zip(("file", "instance", ANSWER), columns, strict=True)))
    pq.write_table(table, folder / PACKED, compression="zstd", compression_level=19)
    for file in files:
        file.unlink()
    return len(files)


def unpack(folder: Path) -> int:
    """Write the files of `cells.parquet` to where they were; returns how many."""
    by_file: dict[str, list[Row]] = {}
    for row in pq.read_table(folder / PACKED).to_pylist():
        by_file.setdefault(row["file"], []).append((row["file"], row["instance"], row[ANSWER]))
    for name, rows in by_file.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(f"{line}\n" for line in _joined(rows)), encoding="utf-8")
    return len(by_file)


def _taken_apart(line: str) -> tuple[str, str | None]:
    """The instance, with a mark where its answer was, and the answer; the header as it is."""
    record = json.loads(line)
    if ANSWER not in record:
        return line, None
    answer = record[ANSWER]
    record[ANSWER] = _HERE
    return json.dumps(record, ensure_ascii=False), answer


def _joined(rows: Iterable[Row]) -> Iterator[str]:
    for _, instance, answer in rows:
        mark = json.dumps(_HERE)
        yield (
            instance if answer is None else instance.replace(mark, json.dumps(answer, ensure_ascii=False), 1)
        )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["pack", folder]:
            print(f"{pack(Path(folder))} files are in {folder}/{PACKED}")
        case ["unpack", folder]:
            print(f"{unpack(Path(folder))} files of {folder}/{PACKED} are where they were")
        case _:
            sys.exit(__doc__)
