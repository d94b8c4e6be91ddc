"""The finished cells of a folder, by experiment: which of them belong in a table, and what they scored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora_cli.benchmarks.metrics import InstanceScores
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.compare import read_run
from mixlora_cli.evaluation.results import FILE_NAME
from mixlora_cli.reproduce.cell import EVALUATION, RECORD, SEEN_EVALUATION, read_record

Key = tuple[str, int, str | None]
"""Experiment, seed, task."""


@dataclass(frozen=True)
class Found:
    """A cell on the disk."""

    folder: Path
    record: Mapping[str, Any]

    def evaluation(self, seen: bool) -> Path | None:
        """Folder of its finished evaluation; None where it has not been made."""
        place = self.folder / (SEEN_EVALUATION if seen else EVALUATION)
        return place if (place / FILE_NAME).is_file() else None


@dataclass(frozen=True)
class Cells:
    """The newest cell of each experiment, seed and task."""

    newest: Mapping[Key, Found]
    older: Mapping[Key, int]
    """How many cells of other configurations were passed over."""

    def seeds(self, experiment: str) -> list[int]:
        """Seeds that there are cells of, finished or not."""
        return sorted({seed for name, seed, _ in self.newest if name == experiment})


def find_cells(folder: Path) -> Cells:
    """The cells in `folder`.

    Of several configurations of one cell the one that was asked for last counts, even if it has no result: an older one
    would be another experiment in the place of a failed one.

    Raises:
        UserError: there is no cell.
    """
    by_key: dict[Key, list[Found]] = defaultdict(list)
    for path in sorted(folder.glob(f"*/{RECORD}")):
        record = read_record(path.parent)
        if "experiment" in record:
            by_key[record["experiment"], record["seed"], record["task"]].append(Found(path.parent, record))
    if not by_key:
        raise UserError(
            f"runs={folder}: no cells there; expected the folder that `mixlora reproduce` wrote to"
        )
    newest = {key: max(cells, key=lambda cell: float(cell.record["used"])) for key, cells in by_key.items()}
    return Cells(newest, {key: len(cells) - 1 for key, cells in by_key.items() if len(cells) > 1})


def seen_marks(
    cells: Cells, experiment: str, seed: int, tasks: list[str], per_task: bool
) -> dict[str, InstanceScores]:
    """Scores of the held-out instances of each seen task; specialists have a cell for each, the others one for all."""
    marks: dict[str, InstanceScores] = {}
    for task in tasks:
        cell = cells.newest.get((experiment, seed, task if per_task else None))
        place = cell.evaluation(seen=True) if cell else None
        if place is None or (not per_task and marks):
            continue
        run = read_run(str(place))
        marks |= {
            name: found for (split, name), found in run.tasks.items() if split == "heldout" and name in tasks
        }
    return marks
