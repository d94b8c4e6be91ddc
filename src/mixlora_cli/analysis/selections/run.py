"""`mixlora tsne`: from a MixLoRA run to maps of the factors that tasks select, and what they are worth in numbers."""

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

from mixlora_cli.analysis.selections.figures import draw_all, styles_of
from mixlora_cli.analysis.selections.maps import INFORMATION, BesideChance, Floats, Map, Maps, make_maps
from mixlora_cli.analysis.selections.page import write_page
from mixlora_cli.analysis.selections.reading import (
    SelectionStore,
    choose_instances,
    find_layers,
    read_missing,
)
from mixlora_cli.config import TsneConfig
from mixlora_cli.models.session import about_mixlora, refuse_adapter_folder
from mixlora_cli.output import alone_in
from mixlora_cli.progress import say
from mixlora_cli.store import atomic, write_text
from mixlora_cli.tables import Cell, Table, show
from mixlora_cli.training.run_folder import versions

FORMAT = "mixlora-tsne/1"


def tsne(config: TsneConfig) -> Path:
    """Read what is not read yet, draw and measure it into `config.output_dir`, which is returned.

    Raises:
        UserError: there is no finished MixLoRA adapter, or tasks or layers do not fit. Found before a model is loaded.
    """
    folder = Path(config.output_dir).expanduser()
    run, adapter, layers, drawn = find_layers(config)
    refuse_adapter_folder(folder)
    with alone_in(folder, "map"):
        console = Console(stderr=True, soft_wrap=True)
        chosen = choose_instances(config)
        store = SelectionStore(folder / "selections")
        if read_missing(config, run, layers, chosen, store, console) == 0:
            say("all selections were read before: drawn without the model", console)
        selections = [store.read(instances, drawn, config.tsne.sides) for instances in chosen]

        maps = make_maps(config, adapter, drawn, chosen, selections, console)
        heading = f"{run.label}: selections of {config.tsne.linear}"
        about = {
            "run": str(config.run),
            "label": run.label,
            "adapter": about_mixlora(run, adapter),
            "settings": asdict(config.tsne) | {"seed": config.seed, "pairs": config.pairs},
            "versions": versions(),
        }
        _write_numbers(maps, about, folder / "tsne.json")
        _write_points(maps, folder / "points.parquet")
        styles = styles_of(maps.names, config.pairs)
        draw_all(maps, styles, config.pairs, folder, heading)
        write_page(maps, styles, config.tsne.page_mb, folder, heading, console)
        for note in maps.notes:
            say(f"note: {note}", console)
        _print(maps)
        say(f"map, use and overlap (.png, .svg), tsne.html and tsne.json are in {folder}", console)
    return folder


def _write_numbers(maps: Maps, about: Mapping[str, Any], path: Path) -> None:
    content = {
        "format": FORMAT,
        **about,
        "tasks": [
            {"task": one.task, "split": one.split, "instances": size, "available": one.available}
            for one, size in zip(maps.tasks, maps.sizes, strict=True)
        ],
        "perplexity": maps.perplexity,
        "neighbours": maps.neighbours,
        "notes": list(maps.notes),
        "maps": [_numbers(one, maps.names) for one in maps.each],
    }
    write_text(path, json.dumps(content, indent=1))


def _numbers(one: Map, names: Sequence[str]) -> dict[str, Any]:
    return {
        "layer": one.layer.name,
        "block": one.layer.block,
        "side": one.side,
        "distinct selections": len(one.space.vectors),
        "factors never selected": int((one.use.sum(axis=0) == 0).sum()),
        **{
            f"normalised {name}" if name == INFORMATION else name: _beside_chance(found, names)
            for name, found in one.separation.items()
        },
        "factor use": dict(zip(names, one.use.round(6).tolist(), strict=True)),
        "overlap": _square(one.overlap, names),
        "mean Jaccard similarity": _square(one.similarity, names),
        "pairs": None if one.matching is None else asdict(one.matching),
    }


def _beside_chance(found: BesideChance, names: Sequence[str]) -> dict[str, Any]:
    chance = {"mean": found.mean, "low": found.low, "high": found.high}
    tasks = {"tasks": dict(zip(names, found.by_task, strict=True))} if found.by_task else {}
    return {"value": found.value, "chance": chance, "p": found.p, **tasks}


def _square(values: Floats, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    rows = [[None if math.isnan(x) else round(x, 6) for x in row] for row in values.tolist()]
    return {name: dict(zip(names, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def _write_points(maps: Maps, path: Path) -> None:
    """The place of every instance on every map."""
    rows = [
        {
            "index": record.index,
            "id": record.id,
            "split": maps.tasks[label].split,
            "task": maps.tasks[label].task,
            "block": one.layer.block,
            "side": one.side,
            "x": x,
            "y": y,
        }
        for one in maps.each
        for record, label, (x, y) in zip(maps.records, maps.labels, one.points.tolist(), strict=True)
    ]
    with atomic(path) as temp:
        pq.write_table(pa.Table.from_pylist(rows), temp, compression="zstd")


def _print(maps: Maps) -> None:
    """The numbers of each map beside those of shuffled labels."""
    rows: list[tuple[Cell | str, ...]] = [
        (
            one.title,
            f"{len(one.space.vectors)} of {len(maps.labels)}",
            *(
                Cell(f"{found.value:.3f}", f"[{found.low:.3f}, {found.high:.3f}]", f"p={found.p:.3f}")
                for found in one.separation.values()
            ),
        )
        for one in maps.each
    ]
    title = f"How far selections tell {len(maps.tasks)} tasks apart [shuffled labels, 95 %]"
    headings = ("map", "selections", *maps.each[0].separation)
    console = Console(highlight=False)
    show(Table(title, headings, tuple(rows)), console)
    for one in maps.each:
        if (match := one.matching) is not None:
            say(
                f"{one.title}: overlap with the seen partner {match.partner:.2f}, with the other seen tasks "
                f"{match.others:.2f} (p={match.p:.3f}); the partner is nearest for {match.nearest} of {match.count}",
                console,
            )
