"""What each finished task leaves on the disk, so that an interrupted measurement goes on with the next one.

    tasks/<name>/direction.safetensors   u_j, a vector for each group (first pass)
    tasks/<name>/products.jsonl          a header, then a line for each batch (second pass)

Both are written whole or not at all, and hold a fingerprint of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixlora_cli.analysis.interference.groups import Group
from mixlora_cli.analysis.interference.passes import Products
from mixlora_cli.store import write_text

DIRECTION, PRODUCTS = "direction.safetensors", "products.jsonl"


def fingerprint(parts: Any) -> str:
    """16 hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TaskStore:
    """The files of one task."""

    folder: Path
    task: str
    own: str
    """Fingerprint of model, adapter, settings and this task's instances."""
    all: str
    """The same, with the other tasks and their instances."""

    def has_direction(self) -> bool:
        """The first pass is done."""
        try:
            with safe_open(self.folder / DIRECTION, framework="pt") as file:
                return (file.metadata() or {}).get("fingerprint") == self.own
        except (OSError, SafetensorError):
            return False

    def write_direction(self, groups: Sequence[Group], direction: Sequence[Tensor]) -> None:
        """Keep u_j."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {group.name: v.cpu().contiguous() for group, v in zip(groups, direction, strict=True)}
        draft = self.folder / f"{DIRECTION}.tmp"
        save_file(tensors, draft, metadata={"fingerprint": self.own})
        os.replace(draft, self.folder / DIRECTION)

    def read_direction(self, groups: Sequence[Group], device: Any) -> list[Tensor]:
        """u_j, in the order of `groups`."""
        with safe_open(self.folder / DIRECTION, framework="pt") as file:
            return [file.get_tensor(group.name).to(device) for group in groups]

    def has_products(self) -> bool:
        """The second pass is done."""
        try:
            with (self.folder / PRODUCTS).open(encoding="utf-8") as file:
                return bool(json.loads(file.readline()).get("fingerprint") == self.all)
        except (OSError, ValueError, AttributeError):
            return False

    def write_products(self, groups: Sequence[Group], products: Products) -> None:
        """Keep the second pass's numbers, each digit of them."""
        header = {"fingerprint": self.all, "task": self.task, "groups": [[g.layer, g.matrix] for g in groups]}
        lines = [header] + [
            {"batch": number, "norms": norms.tolist(), "projections": projections.tolist()}
            for number, (norms, projections) in enumerate(
                zip(products.norms, products.projections, strict=True)
            )
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / PRODUCTS, "".join(json.dumps(line) + "\n" for line in lines))

    def read_products(self) -> tuple[tuple[Group, ...], Products]:
        """The groups and the numbers of the second pass."""
        with (self.folder / PRODUCTS).open(encoding="utf-8") as file:
            header, *lines = map(json.loads, file)
        groups = tuple(Group(layer, matrix) for layer, matrix in header["groups"])
        projections = np.array([line["projections"] for line in lines], dtype=np.float64)
        return groups, Products(projections, np.array([line["norms"] for line in lines], dtype=np.float64))


def task_stores(root: Path, own: Mapping[str, Any]) -> dict[str, TaskStore]:
    """Stores of all tasks, in their order.

    Args:
        root: the output folder.
        own: for each task, what its direction depends on.
    """
    prints = {task: fingerprint(parts) for task, parts in own.items()}
    together = list(prints.items())
    return {
        task: TaskStore(root / "tasks" / _folder_name(task), task, digest, fingerprint([digest, together]))
        for task, digest in prints.items()
    }


def _folder_name(task: str) -> str:
    """Readable, and alike for no two tasks whatever the other tasks are."""
    plain = re.sub(r"[^\w+-]+", "_", task)[:60]
    return f"{plain}-{hashlib.sha256(task.encode()).hexdigest()[:6]}"
