"""`tsne.json`, `points.parquet` and the table that is printed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from mixlora_cli.analysis.selections.atlas import Atlas, Panel
from mixlora_cli.analysis.selections.separation import Measured
from mixlora_cli.analysis.selections.space import Floats

FILE_NAME, POINTS = "tsne.json", "points.parquet"
FORMAT = "mixlora-tsne/1"
_WIDTH = 125


def write_report(atlas: Atlas, about: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the numbers, and the place of every instance on every map."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        **about,
        "tasks": [
            {
                "task": one.task,
                "split": one.split,
                "instances": int((atlas.labels == number).sum()),
                "available": one.available,
            }
            for number, one in enumerate(atlas.tasks)
        ],
        "perplexity": atlas.perplexity,
        "neighbours": atlas.neighbours,
        "notes": list(atlas.notes),
        "maps": [_panel(atlas, panel) for panel in atlas.panels],
    }
    numbers = folder / FILE_NAME
    numbers.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _write_points(atlas, folder / POINTS)
    return [numbers, folder / POINTS]


def print_report(atlas: Atlas) -> None:
    """The numbers of each map beside those of shuffled labels."""
    table = Table(title=f"How far selections tell {len(atlas.tasks)} tasks apart \\[shuffled labels, 95 %]")
    for heading in ("map", "selections", "silhouette", "neighbour purity", "mutual information"):
        table.add_column(heading, justify="left" if heading == "map" else "right")
    for panel in atlas.panels:
        found = panel.separation
        table.add_row(
            panel.title,
            f"{len(panel.space.vectors)} of {len(atlas.labels)}",
            *map(_cell, (found.silhouette, found.purity, found.information)),
        )
    # In a file or a narrow window the numbers stay on their lines.
    console = Console(width=max(Console().width, _WIDTH))
    console.print(table)
    for panel in atlas.panels:
        if (match := panel.matching) is not None:
            console.print(
                f"{panel.title}: overlap with the seen partner {match.partner:.2f}, with the other seen tasks "
                f"{match.others:.2f} (p={match.p:.3f}); the partner is nearest for {match.nearest} of {match.count}",
                markup=False,
                highlight=False,
            )


def _cell(measured: Measured) -> str:
    return f"{measured.value:.3f} \\[{measured.low:.3f}, {measured.high:.3f}] p={measured.p:.3f}"


def _panel(atlas: Atlas, panel: Panel) -> dict[str, Any]:
    names = [one.task for one in atlas.tasks]
    found = panel.separation
    return {
        "layer": panel.layer.name,
        "block": panel.layer.block,
        "side": panel.side,
        "distinct selections": len(panel.space.vectors),
        "factors never selected": int((panel.use.sum(axis=0) == 0).sum()),
        "silhouette": _measured(found.silhouette, names),
        "neighbour purity": _measured(found.purity, names),
        "normalised mutual information": _measured(found.information, names),
        "factor use": dict(zip(names, panel.use.round(6).tolist(), strict=True)),
        "overlap": _square(panel.overlap, names),
        "mean Jaccard similarity": _square(panel.similarity, names),
        "pairs": None if panel.matching is None else asdict(panel.matching),
    }


def _measured(measured: Measured, names: Sequence[str]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "value": measured.value,
        "chance": {"mean": measured.chance, "low": measured.low, "high": measured.high},
        "p": measured.p,
    }
    if measured.by_task:
        content["tasks"] = dict(zip(names, measured.by_task, strict=True))
    return content


def _square(values: Floats, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    rows = [[None if math.isnan(x) else round(x, 6) for x in row] for row in values.tolist()]
    return {name: dict(zip(names, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def _write_points(atlas: Atlas, path: Path) -> None:
    tasks = [atlas.tasks[label] for label in atlas.labels]
    tables = [
        pa.table(
            {
                "index": [record.index for record in atlas.records],
                "id": [record.id for record in atlas.records],
                "split": [one.split for one in tasks],
                "task": [one.task for one in tasks],
                "block": [panel.layer.block] * len(tasks),
                "side": [panel.side] * len(tasks),
                "x": panel.points[:, 0],
                "y": panel.points[:, 1],
            }
        )
        for panel in atlas.panels
    ]
    pq.write_table(pa.concat_tables(tables), path, compression="zstd")
