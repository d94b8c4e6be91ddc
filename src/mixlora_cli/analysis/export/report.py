"""What an export lost, as `export.json` and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixlora_cli.analysis.export.comparison import KINDS, MIXLORA, STATIC, Estimate, Measure
from mixlora_cli.analysis.export.fit import Energies
from mixlora_cli.analysis.export.source import FILE_NAME, FORMAT
from mixlora_cli.errors import cut
from mixlora_cli.store import write_text

FILE_WIDTH = 150
"""Characters of a line where the output is no terminal: nothing wraps in a log file."""


@dataclass(frozen=True)
class Exported:
    """One static adapter."""

    folder: str
    """Its name inside `output_dir`."""
    tasks: Sequence[str]
    instances: Mapping[str, int]
    """Inputs that it was fitted to, by task; empty where chance selects."""
    rank: int
    layers: Mapping[str, Energies]

    @property
    def energies(self) -> Energies:
        """Of all layers together."""
        return reduce(Energies.__add__, self.layers.values())


def write_report(
    folder: Path, about: Mapping[str, Any], adapters: Sequence[Exported], measures: Sequence[Measure]
) -> None:
    """Write `export.json`, whole or not at all; `finished` tells it from that of an export that was interrupted."""
    content = {
        "format": FORMAT,
        "finished": True,
        **about,
        "adapters": [_adapter(adapter) for adapter in adapters],
        "comparison": [_measure(measure) for measure in measures] or None,
    }
    write_text(folder / FILE_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _adapter(adapter: Exported) -> dict[str, Any]:
    return {
        "folder": adapter.folder,
        "tasks": list(adapter.tasks),
        "instances": dict(adapter.instances),
        "rank": adapter.rank,
        "energy": _energies(adapter.energies),
        "layers": {name: _energies(energies) for name, energies in adapter.layers.items()},
    }


def _energies(energies: Energies) -> dict[str, float]:
    return {
        "selected": energies.selected,
        "lost_by_averaging": energies.lost_by_averaging,
        "kept_by_rank": energies.kept_by_rank,
        "kept_in_all": energies.kept_in_all,
    }


def _measure(measure: Measure) -> dict[str, Any]:
    def nested(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        tasks = {task: asdict(estimate) for task, estimate in estimates.items() if task}
        return {"mean": asdict(estimates[""]), "tasks": tasks}

    return {
        "name": measure.name,
        "unit": measure.unit,
        "rule": measure.rule,
        "adapter kind": {kind: nested(estimates) for kind, estimates in measure.kinds.items()},
        f"{STATIC} - {MIXLORA}, paired": nested(measure.difference),
    }


def energy_table(adapters: Sequence[Exported]) -> Table:
    """A row for each adapter: all layers together, and the layer that keeps least."""
    caption = (
        "Shares of the selected updates' squared Frobenius norm. Lost by averaging: how far instances' updates lie "
        "from their mean."
    )
    table = _new_table("Static adapters", caption)
    table.add_column("adapter")
    for heading in ("rank", "inputs", "lost by averaging", "kept by rank", "kept in all", "least in a layer"):
        table.add_column(heading, justify="right")
    for adapter in adapters:
        energies = adapter.energies
        inputs = str(sum(adapter.instances.values())) if adapter.instances else "any"
        shares = (energies.lost_by_averaging, energies.kept_by_rank, energies.kept_in_all)
        least = min(layer.kept_in_all for layer in adapter.layers.values())
        table.add_row(
            Text(adapter.folder), str(adapter.rank), inputs, *(f"{100 * s:.1f} %" for s in (*shares, least))
        )
    return table


def measure_table(measure: Measure) -> Table:
    """A row for each task and their mean: every adapter kind, and the paired difference."""
    digits = 1 if measure.unit == "%" else 3
    table = _new_table(f"Held-out instances: {measure.name} ({measure.unit}) [95 % interval]")
    table.add_column("task")
    for heading in (*KINDS, f"{STATIC} - {MIXLORA}"):
        table.add_column(heading, justify="right")

    def row(task: str) -> list[Text]:
        estimates = [*(measure.kinds[kind][task] for kind in KINDS), measure.difference[task]]
        return [Text(f"{e.value:.{digits}f} [{e.low:.{digits}f}, {e.high:.{digits}f}]") for e in estimates]

    for task in measure.difference:
        if task:
            table.add_row(Text(cut(task)), *row(task))
    table.add_section()
    table.add_row("mean", *row(""))
    return table


def print_report(adapters: Sequence[Exported], measures: Sequence[Measure]) -> None:
    """Print the tables."""
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(energy_table(adapters))
    for measure in measures:
        console.print(measure_table(measure))


def _new_table(title: str, caption: str | None = None) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
