"""One cell of a grid: a training and what is done with it, in a folder whose name says what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mixlora_cli.store import write_text
from mixlora_cli.training.run_folder import RunFolder, essentials

RECORD = "cell.json"
EVALUATION = "eval"
"""Folder of the unseen benchmarks' evaluation inside a cell; where `mixlora compare` and others look."""
SEEN_EVALUATION = "eval-seen"
"""Folder of the evaluation on held-out instances of the six seen tasks."""


@dataclass(frozen=True)
class Part:
    """One command of a cell, a process of its own."""

    name: str
    """"train", "eval", "eval-seen" or a figure's."""
    arguments: tuple[str, ...]
    """Of `mixlora`."""
    result: Path
    """Written last: a part that has it is finished."""
    asked: Mapping[str, Any]
    """What decides the result; a part that was finished with something else is done anew."""
    seconds: float | None
    """How long it should take; None: nobody knows."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What a table tells of a training: steps, batch size, learning rate."""
    steps: int | None = None
    """Optimizer steps of a training, where its configuration says."""


@dataclass(frozen=True)
class Cell:
    """An experiment with one seed (and for specialists one task) and one configuration."""

    experiment: str
    seed: int
    task: str | None
    folder: Path
    parts: tuple[Part, ...]
    after: Path | None = None
    """Folder of a cell that has to end before this one begins; that cell comes earlier in the grid, if at all."""

    @property
    def title(self) -> str:
        """What a person calls it: "lora_r4 seed 0"."""
        task = "" if self.task is None else f" {self.task}"
        return f"{self.experiment}{task} seed {self.seed}"


def read_record(folder: Path) -> dict[str, Any]:
    """`cell.json` of a cell's folder; empty when there is none that can be read."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record


def write_record(
    cell: Cell, part: Part | None = None, seconds: float | None = None, when: float = 0.0
) -> None:
    """Note what the cell is, when it was last asked for, and what `part` was asked and took."""
    record = read_record(cell.folder)
    parts = record.get("parts", {})
    if part is not None:
        parts[part.name] = {"asked": dict(part.asked), "seconds": seconds}
    content = {
        "experiment": cell.experiment,
        "seed": cell.seed,
        "task": cell.task,
        "about": next((dict(each.about) for each in cell.parts if each.about), {}),
        "used": when or record.get("used", 0.0),
        "parts": parts,
    }
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_text(cell.folder / RECORD, json.dumps(content, indent=2) + "\n")


def finished(cell: Cell, part: Part) -> bool:
    """Whether the part is there, made with what is asked now, and with the adapter that is there."""
    if not part.result.is_file():
        return False
    if part.name == "train":  # the run folder itself knows; whoever deleted cell.json need not train again
        config: Any = OmegaConf.to_container(OmegaConf.load(RunFolder(cell.folder).config))
        return plain(essentials(config)) == part.asked
    if read_record(cell.folder).get("parts", {}).get(part.name, {}).get("asked") != part.asked:
        return False
    return all(finished(cell, each) for each in cell.parts if each.name == "train")


def begin(cell: Cell, part: Part, when: float) -> None:
    """Note what is asked, and when, before a missing part runs; results of other settings or another adapter go."""
    for each in cell.parts if part.name == "train" else (part,):
        if each.name != "train":
            each.result.unlink(missing_ok=True)
    write_record(cell, part, when=when)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, so that what was asked and what is asked compare."""
    content: dict[str, Any] = json.loads(json.dumps(dict(values), sort_keys=True))
    return content
