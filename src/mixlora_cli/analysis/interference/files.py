"""What a measurement leaves in its folder: enough to go on after a kill, to compare, and to draw without a model.

interference.json      averages, blocks, layers, negative interference, denominators, what it depends on; comes last
interference.parquet   a row for each batch of task i, adapted layer, matrix and task j
layers.parquet         a row for each adapted layer, matrix and pair of tasks
measured.jsonl         a header, then a line for each real step
tasks/<name>/direction.safetensors   u_j, a vector for each group (first pass)
tasks/<name>/products.jsonl          a header, then a line for each batch (second pass)

Each is complete or not there; those of tasks and steps hold a fingerprint of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixlora_cli.analysis.interference.gradients import Floats, Group, Products, Step
from mixlora_cli.analysis.interference.scores import VARIANTS, Measurement, ratios, score
from mixlora_cli.errors import UserError
from mixlora_cli.store import atomic, digest_of, write_text

FORMAT = "mixlora-interference/1"
RESULT, BATCHES, LAYERS, STEPS = (
    "interference.json",
    "interference.parquet",
    "layers.parquet",
    "measured.jsonl",
)
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
        return str(self.about["label"])

    @property
    def samples(self) -> dict[str, str]:
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


def open_other(path: str) -> Stored:
    """The measurement of another run, given as its run folder or as the interference folder itself.

    Raises:
        UserError: there is none.
    """
    root = Path(path).expanduser()
    for folder in (root, root / "interference"):
        stored = read_stored(folder)
        if stored is not None:
            return stored
    raise UserError(
        f"compare={path}: no {RESULT} there; measure that run first with `mixlora interference run={path}` and the "
        "same tasks and settings"
    )


def check_comparable(path: str, other: Stored, samples: Mapping[str, str], number_format: str) -> None:
    """Raise UserError unless the other adapter was measured on the same batches and in the same number format.

    `samples`: digest by task.
    """
    if other.about[NUMBER_FORMAT] != number_format:
        raise UserError(
            f"compare={path} was measured in {other.about[NUMBER_FORMAT]}, this one in {number_format}; measure both "
            "with the same interference.precision"
        )
    theirs = other.samples
    if list(theirs) != list(samples):
        raise UserError(
            f"compare={path} was measured on other tasks ({', '.join(theirs)}); expected the same ones in the same "
            f"order: {', '.join(samples)}"
        )
    changed = [task for task in samples if samples[task] != theirs[task]]
    if changed:
        raise UserError(
            f"compare={path} was measured on other instances of {', '.join(changed)}; measure both with the same data, "
            "seed, interference.split, interference.batches and interference.batch_size"
        )


def write_tables(folder: Path, measurement: Measurement) -> None:
    """Write the Parquet files in place of those of another measurement, whose other results go."""
    (folder / RESULT).unlink(missing_ok=True)
    for old in folder.glob("compare_*"):
        old.unlink()
    batches = pa.concat_tables(_batches_of(measurement, i) for i in range(len(measurement.tasks)))
    layers = pa.concat_tables(_scores_of(measurement, k) for k in range(len(measurement.groups)))
    for name, table in {BATCHES: batches, LAYERS: layers}.items():
        with atomic(folder / name) as temp:
            pq.write_table(table, temp, compression="zstd")


def _batches_of(measurement: Measurement, i: int) -> pa.Table:
    """The products of task i, in the order batch, group, j."""
    products = measurement.products[i]
    n, num_groups, num_tasks = products.projections.shape
    norms = np.repeat(products.norms.ravel(), num_tasks)
    columns = {
        "task_i": [measurement.tasks[i]] * norms.size,
        "batch": np.repeat(np.arange(n), num_groups * num_tasks),
        **_group_columns([group for group in measurement.groups for _ in range(num_tasks)] * n),
        "task_j": list(measurement.tasks) * (n * num_groups),
        "projection": products.projections.ravel(),
        "norm": norms,
        "ratio": ratios(products, i).ravel(),
    }
    return pa.table(columns)


def _scores_of(measurement: Measurement, k: int) -> pa.Table:
    """The scores of group k alone, with intervals for the mean."""
    alone = measurement.only([number == k for number in range(len(measurement.groups))])
    num_tasks = len(measurement.tasks)
    mean = score(alone, "mean", resample=True)
    low, high = mean.interval() or (mean.value, mean.value)
    values: dict[str, Floats] = {v: mean.value if v == "mean" else score(alone, v).value for v in VARIANTS}
    columns = {
        **_group_columns([measurement.groups[k]] * num_tasks**2),
        "task_i": [task for task in measurement.tasks for _ in range(num_tasks)],
        "task_j": list(measurement.tasks) * num_tasks,
        **{name: value.ravel() for name, value in {**values, "low": low, "high": high}.items()},
    }
    return pa.table(columns)


def _group_columns(groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "layer": [group.layer for group in groups],
        "number": pa.array([group.number for group in groups], pa.int64()),
        "block": [group.block for group in groups],
        "module": [group.layer.rpartition(".")[2] for group in groups],
        "matrix": [group.matrix for group in groups],
    }


def _read_batches(path: Path, tasks: Sequence[str]) -> Measurement:
    """The inverse of `_batches_of`, for all tasks."""
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


@dataclass(frozen=True)
class TaskFiles:
    """What both passes leave of one task."""

    folder: Path
    task: str
    own: str
    """Fingerprint of model, adapter, settings and this task's instances."""
    all: str
    """The same, with the other tasks and their instances."""

    @property
    def _direction(self) -> Path:
        return self.folder / "direction.safetensors"

    @property
    def _products(self) -> Path:
        return self.folder / "products.jsonl"

    def has_direction(self) -> bool:
        """The first pass is done."""
        try:
            with safe_open(self._direction, framework="pt") as file:
                return (file.metadata() or {}).get("fingerprint") == self.own
        except (OSError, SafetensorError):
            return False

    def write_direction(self, groups: Sequence[Group], direction: Sequence[Tensor]) -> None:
        tensors = {group.name: v.cpu().contiguous() for group, v in zip(groups, direction, strict=True)}
        with atomic(self._direction) as temp:
            save_file(tensors, temp, metadata={"fingerprint": self.own})

    def read_direction(self, groups: Sequence[Group], device: Any) -> list[Tensor]:
        """u_j, in the order of `groups`."""
        with safe_open(self._direction, framework="pt") as file:
            return [file.get_tensor(group.name).to(device) for group in groups]

    def has_products(self) -> bool:
        """The second pass is done."""
        try:
            with self._products.open(encoding="utf-8") as file:
                return bool(json.loads(file.readline()).get("fingerprint") == self.all)
        except (OSError, ValueError, AttributeError):
            return False

    def write_products(self, groups: Sequence[Group], products: Products) -> None:
        """Keep the second pass's numbers, each digit of them."""
        both = zip(products.norms.tolist(), products.projections.tolist(), strict=True)
        header = {"fingerprint": self.all, "task": self.task, "groups": [[g.layer, g.matrix] for g in groups]}
        lines = [{"batch": k, "norms": norms, "projections": p} for k, (norms, p) in enumerate(both)]
        _write_lines(self._products, [header, *lines])

    def read_products(self) -> tuple[tuple[Group, ...], Products]:
        header, *lines = _read_lines(self._products)
        groups = tuple(Group(layer, matrix) for layer, matrix in header["groups"])
        projections = np.array([line["projections"] for line in lines], dtype=np.float64)
        return groups, Products(projections, np.array([line["norms"] for line in lines], dtype=np.float64))


def task_files(root: Path, own: Mapping[str, Any]) -> dict[str, TaskFiles]:
    """Files of all tasks, in their order.

    Args:
        root: the output folder.
        own: for each task, what its direction depends on.
    """
    digests = {task: digest_of(parts) for task, parts in own.items()}
    together = list(digests.items())
    return {
        task: TaskFiles(root / "tasks" / _folder_name(task), task, digest, digest_of([digest, together]))
        for task, digest in digests.items()
    }


def _folder_name(task: str) -> str:
    """Readable, and alike for no two tasks whatever the other tasks are."""
    plain = re.sub(r"[^\w+-]+", "_", task)[:60]
    return f"{plain}-{hashlib.sha256(task.encode()).hexdigest()[:6]}"


def write_steps(folder: Path, fingerprint: str, steps: Sequence[Step]) -> None:
    """Write `measured.jsonl`."""
    lines = [{**asdict(step), "measured": step.measured} for step in steps]
    _write_lines(folder / STEPS, [{"fingerprint": fingerprint}, *lines])


def read_steps(folder: Path, fingerprint: str | None = None) -> list[Step] | None:
    """Steps of an earlier call; None where there are none with this fingerprint (any, if none is given)."""
    path = folder / STEPS
    if not path.is_file():
        return None
    header, *lines = _read_lines(path)
    if fingerprint is not None and header.get("fingerprint") != fingerprint:
        return None
    return [Step(**{key: value for key, value in line.items() if key != "measured"}) for line in lines]


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
