"""What a finished measurement consists of: `interference.json` and two Parquet files. Enough to draw without a model.

interference.json      averages, blocks, layers, negative interference, denominators, what it depends on
interference.parquet   a row for each batch of task i, adapted layer, matrix and task j
layers.parquet         a row for each adapted layer, matrix and pair of tasks
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixlora_cli.analysis.interference.groups import Group
from mixlora_cli.analysis.interference.passes import Floats, Products
from mixlora_cli.analysis.interference.scores import VARIANTS, Measurement, ratios, score
from mixlora_cli.errors import UserError

FORMAT = "mixlora-interference/1"
RESULT, BATCHES, LAYERS = "interference.json", "interference.parquet", "layers.parquet"
NUMBER_FORMAT = "number_format"
"""Key of `Stored.about`: the base's and the matrix products', float32 or bfloat16."""


@dataclass(frozen=True)
class Stored:
    """A finished measurement."""

    about: Mapping[str, Any]
    """`label`, `request` (what the products depend on but the base's weights), `batch_size`, ..."""
    measurement: Measurement

    @property
    def label(self) -> str:
        """Short name of the adapter."""
        return str(self.about["label"])

    @property
    def samples(self) -> dict[str, str]:
        """Digest of each task's batches."""
        return dict(self.about["request"]["samples"])


def read_stored(folder: Path) -> Stored | None:
    """What a finished measurement left in `folder`; None where there is none.

    Raises:
        UserError: the files cannot be read, or are of another version.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return Stored(content["about"], _read_batches(folder / BATCHES, content["tasks"]))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{folder}: its {RESULT} and {BATCHES} cannot be read ({error}): move the folder away and measure again"
        ) from None


def write_batches(folder: Path, measurement: Measurement) -> None:
    """Write `interference.parquet`, in the order i, batch, group, j."""
    tables = []
    for i, products in enumerate(measurement.products):
        n, num_groups, num_tasks = products.projections.shape
        each_group = np.tile(np.repeat(np.arange(num_groups), num_tasks), n)
        norms = np.repeat(products.norms.ravel(), num_tasks)
        columns = {
            "task_i": [measurement.tasks[i]] * norms.size,
            "batch": np.repeat(np.arange(n), num_groups * num_tasks),
            **_group_columns(measurement.groups, each_group),
            "task_j": list(measurement.tasks) * (n * num_groups),
            "projection": products.projections.ravel(),
            "norm": norms,
            "ratio": ratios(products, i).ravel(),
        }
        tables.append(pa.table(columns))
    _write_table(folder / BATCHES, pa.concat_tables(tables))


def write_layers(folder: Path, measurement: Measurement) -> None:
    """Write `layers.parquet`: the scores of each single group, with intervals for the mean."""
    num_tasks = len(measurement.tasks)
    columns: dict[str, list[Any]] = {}
    for number, group in enumerate(measurement.groups):
        alone = measurement.only([k == number for k in range(len(measurement.groups))])
        mean = score(alone, "mean", resample=True)
        low, high = mean.interval() or (mean.value, mean.value)
        values: dict[str, Floats] = {
            v: mean.value if v == "mean" else score(alone, v).value for v in VARIANTS
        }
        numbers: dict[str, Floats] = {**values, "low": low, "high": high}
        rows: dict[str, list[Any]] = {
            **_group_columns([group], np.zeros(num_tasks**2, dtype=np.int64)),
            "task_i": [task for task in measurement.tasks for _ in range(num_tasks)],
            "task_j": list(measurement.tasks) * num_tasks,
            **{name: value.ravel().tolist() for name, value in numbers.items()},
        }
        for name, column in rows.items():
            columns.setdefault(name, []).extend(column)
    _write_table(folder / LAYERS, pa.table(columns))


def _group_columns(
    groups: Sequence[Group], order: np.ndarray[Any, np.dtype[np.int64]]
) -> dict[str, list[Any]]:
    return {
        "layer": [groups[k].layer for k in order],
        "number": [groups[k].number for k in order],
        "block": [groups[k].block for k in order],
        "module": [groups[k].module for k in order],
        "matrix": [groups[k].matrix for k in order],
    }


def _write_table(path: Path, table: pa.Table) -> None:
    draft = path.with_name(path.name + ".tmp")
    pq.write_table(table, draft, compression="zstd")
    os.replace(draft, path)


def _read_batches(path: Path, tasks: Sequence[str]) -> Measurement:
    """The inverse of `write_batches`."""
    table = pq.read_table(
        path, columns=["task_i", "batch", "layer", "matrix", "task_j", "projection", "norm"]
    )
    num_tasks = len(tasks)
    of_task, batch = np.array(table["task_i"].to_pylist()), table["batch"].to_numpy()
    projection, norm = table["projection"].to_numpy(), table["norm"].to_numpy()
    once = np.flatnonzero((of_task == tasks[0]) & (batch == 0))[::num_tasks]
    names = zip(*(table[column].take(once).to_pylist() for column in ("layer", "matrix")), strict=True)
    groups = tuple(Group(layer, matrix) for layer, matrix in names)
    products = []
    for task in tasks:
        shape = (-1, len(groups), num_tasks)
        mine = of_task == task
        products.append(Products(projection[mine].reshape(shape), norm[mine].reshape(shape)[:, :, 0]))
    return Measurement(tuple(tasks), groups, tuple(products))
