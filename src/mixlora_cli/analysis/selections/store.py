"""Selections on disk: a Parquet file for each task, so that drawing needs no model and a stopped reading goes on.

    <folder>/<task>-<hash>.parquet    index, id, split, task, layer, block, side, factors

One row for each instance, layer and side; `factors` is the list of selected factors, best first. The file's metadata
says what the selections depend on, and is compared before they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixlora_cli.analysis.selections.inputs import Instances
from mixlora_cli.analysis.selections.source import Layer
from mixlora_cli.analysis.selections.space import Ints

_KEY = b"mixlora"
_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("layer", pa.string()),
        ("block", pa.int32()),
        ("side", pa.string()),
        ("factors", pa.list_(pa.int32())),
    ]
)
Read = Mapping[tuple[str, str], Ints]
"""By (layer name, side): factors (n, r) of the instances, best first."""


@dataclass(frozen=True)
class TaskSelections:
    """The selections of one task's instances, in the order of `indices`."""

    indices: Sequence[int]
    """`Record.index` of each instance."""
    read: Read


class SelectionStore:
    """The files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, instances: Instances) -> Path:
        """Where a task's selections lie."""
        digest = hashlib.sha256(f"{instances.split}/{instances.task}".encode()).hexdigest()[:8]
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.+-]+', '_', instances.task)[:60]}-{digest}.parquet"

    def base_of(self, instances: Instances, fingerprint: Mapping[str, str]) -> str | None:
        """Fingerprint of the base that a task was read with; None where there is no file that fits `fingerprint`."""
        try:
            metadata = pq.read_schema(self.path(instances)).metadata or {}
            about = json.loads(metadata[_KEY])
            return str(about["base"]) if about["fingerprint"] == dict(fingerprint) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(
        self,
        instances: Instances,
        layers: Sequence[Layer],
        selections: TaskSelections,
        fingerprint: Mapping[str, str],
        base: str,
    ) -> None:
        """Keep a task's selections: complete on the disk, or not there at all."""
        about = json.dumps({"fingerprint": dict(fingerprint), "base": base}).encode()
        ids = {record.index: record.id for record in instances.records}
        count = len(selections.indices)
        tables = []
        for layer in layers:
            for side in ("a", "b"):
                factors = selections.read[layer.name, side]
                columns = {
                    "index": list(selections.indices),
                    "id": [ids[index] for index in selections.indices],
                    "split": [instances.split] * count,
                    "task": [instances.task] * count,
                    "layer": [layer.name] * count,
                    "block": [layer.block] * count,
                    "side": [side] * count,
                    "factors": factors.tolist(),
                }
                tables.append(pa.table(columns, schema=_SCHEMA))
        path = self.path(instances)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        table = pa.concat_tables(tables).replace_schema_metadata({_KEY: about})
        pq.write_table(table, part, compression="zstd")
        part.replace(path)

    def read(self, instances: Instances, layers: Sequence[Layer], sides: Sequence[str]) -> TaskSelections:
        """A task's selections in these layers."""
        wanted = [("layer", "in", [layer.name for layer in layers]), ("side", "in", list(sides))]
        table = pq.read_table(self.path(instances), filters=wanted)
        columns = {name: table.column(name).to_pylist() for name in ("index", "layer", "side", "factors")}
        rows: dict[tuple[str, str], list[list[int]]] = {}
        indices: dict[tuple[str, str], list[int]] = {}
        for index, layer, side, factors in zip(*columns.values(), strict=True):
            rows.setdefault((layer, side), []).append(factors)
            indices.setdefault((layer, side), []).append(index)
        order = next(iter(indices.values()))
        assert all(other == order for other in indices.values())
        return TaskSelections(order, {key: np.array(value, dtype=np.int64) for key, value in rows.items()})
