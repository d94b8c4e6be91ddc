"""`mixlora tsne`: from a MixLoRA run to maps of the factors that tasks select, and what they are worth in numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from mixlora_cli.analysis.selections.atlas import make_atlas
from mixlora_cli.analysis.selections.figures import draw_all
from mixlora_cli.analysis.selections.inputs import choose_instances
from mixlora_cli.analysis.selections.page import write_page
from mixlora_cli.analysis.selections.reading import read_missing
from mixlora_cli.analysis.selections.report import print_report, write_report
from mixlora_cli.analysis.selections.source import Source, find_source
from mixlora_cli.analysis.selections.store import SelectionStore
from mixlora_cli.analysis.selections.thumbnails import make_thumbnails
from mixlora_cli.config import TsneConfig
from mixlora_cli.evaluation.fingerprint import adapter_digest
from mixlora_cli.evaluation.subject import refuse_adapter_folder
from mixlora_cli.output import alone_in
from mixlora_cli.training.run_folder import versions

SELECTIONS = "selections"


def tsne(config: TsneConfig) -> Path:
    """Read what is not read yet, draw and measure it into `config.output_dir`, which is returned.

    Raises:
        UserError: there is no finished MixLoRA adapter, or tasks or layers do not fit. Found before a model is loaded.
    """
    folder = Path(config.output_dir).expanduser()
    source = find_source(config)
    refuse_adapter_folder(folder)
    with alone_in(folder, "map"):
        return _tsne(config, folder, source)


def _tsne(config: TsneConfig, folder: Path, source: Source) -> Path:
    console = Console(stderr=True, soft_wrap=True)
    chosen = choose_instances(config)
    store = SelectionStore(folder / SELECTIONS)
    if read_missing(config, source, chosen, store, console) == 0:
        console.print("all selections were read before: drawn without the model", markup=False)
    selections = [store.read(instances, source.drawn, config.tsne.sides) for instances in chosen]

    atlas = make_atlas(config, source, chosen, selections, console)
    heading = f"{source.subject.label}: selections of {config.tsne.linear}"
    write_report(atlas, _about(config, source), folder)
    draw_all(atlas, config.pairs, folder, heading)
    pictures = make_thumbnails([record.image for record in atlas.records], config.tsne.page_mb, console)
    write_page(atlas, pictures, folder, heading)
    for note in atlas.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    print_report(atlas)
    console.print(
        f"map, use and overlap (.png, .svg), tsne.html and tsne.json are in {folder}",
        markup=False,
        highlight=False,
    )
    return folder


def _about(config: TsneConfig, source: Source) -> dict[str, Any]:
    """What `tsne.json` says of where the selections come from."""
    return {
        "run": str(config.run),
        "label": source.subject.label,
        "adapter": {
            "digest": adapter_digest(source.folder),
            "factors": source.adapter.factors,
            "rank": source.adapter.r,
            "routing": source.adapter.routing,
            "decode": source.adapter.decode,
        },
        "settings": asdict(config.tsne) | {"seed": config.seed, "pairs": config.pairs},
        "versions": versions(),
    }
