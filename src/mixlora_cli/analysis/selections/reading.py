"""From instances to selections on disk: tasks that are there already are not read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console

from mixlora_cli import __version__
from mixlora_cli.analysis.selections.at_prompt import selections_at_prompt
from mixlora_cli.analysis.selections.inputs import Instances
from mixlora_cli.analysis.selections.source import Layer, Source
from mixlora_cli.analysis.selections.space import Ints
from mixlora_cli.analysis.selections.store import SelectionStore, TaskSelections
from mixlora_cli.config import ModelConfig, TsneConfig
from mixlora_cli.data.collate import Collator, PixelLoader, generation_collator
from mixlora_cli.data.encode import Item, encode_prompts
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.fingerprint import adapter_digest, records_digest
from mixlora_cli.evaluation.generate import batches
from mixlora_cli.models import mini
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.base import Base
from mixlora_cli.models.build import build_base
from mixlora_cli.models.features import FeatureCache
from mixlora_cli.models.prepared import prepared_folder, require_prepared
from mixlora_cli.models.stage_one import ASSET
from mixlora_cli.models.task_routing import TaskRouting, routing_of_adapter
from mixlora_cli.progress import with_bar
from mixlora_cli.training.precision import choose_dtype, matrix_products_in

_SIDES = ("a", "b")


@dataclass(frozen=True)
class _Reader:
    """A loaded model and how prompts are put to it."""

    base: Base
    model: PeftModel
    collate: Collator
    dtype: torch.dtype


def read_missing(
    config: TsneConfig, source: Source, chosen: Sequence[Instances], store: SelectionStore, console: Console
) -> int:
    """Read the tasks that `store` does not have as the settings want them; returns how many those were.

    Selections of all blocks are kept, so that other layers of the same kind can be drawn without the model.

    Raises:
        UserError: the model cannot be built, a task has no definition, or none of its instances can be read.
    """
    tasks = {record.task for instances in chosen for record in instances.records}
    routing = routing_of_adapter(source.folder, config.data, tasks)
    dtype = choose_dtype(source.subject.precision)
    common = _fingerprint(config, source, routing, dtype)
    wanted = [
        common | {"records": records_digest(one.records, one.images), "split": one.split} for one in chosen
    ]
    bases = [store.base_of(one, fingerprint) for one, fingerprint in zip(chosen, wanted, strict=True)]
    if None not in bases and len(set(bases)) == 1:
        return 0
    reader = _reader(config, source, routing, dtype)
    missing = [number for number, base in enumerate(bases) if base != reader.base.fingerprint]
    if len(missing) < len(chosen):
        count = f"{len(chosen) - len(missing)} of {len(chosen)}"
        console.print(f"{count} tasks were read before", markup=False, highlight=False)
    for number in missing:
        instances = chosen[number]
        try:
            found = _read(config, source.layers, instances, reader, console)
        except KeyboardInterrupt:
            console.print("stopped: the same command goes on with the tasks that are left", markup=False)
            raise
        store.write(instances, source.layers, found, wanted[number], reader.base.fingerprint)
    return len(missing)


def _reader(config: TsneConfig, source: Source, routing: TaskRouting | None, dtype: torch.dtype) -> _Reader:
    require_prepared(source.subject.model)
    base = build_base(source.subject.model, dtype)
    # The cache changes the model, and definitions are read without an adapter: both come before it.
    features = FeatureCache(base) if config.tsne.cache_features else PixelLoader(base.image_processor)
    embeddings = None if routing is None else routing.embeddings(base)
    model = load_adapter(base.model, source.folder)
    assert isinstance(model, PeftModel)
    if torch.cuda.is_available():
        module: torch.nn.Module = model
        module.cuda()
    pad = base.tokenizer.pad_token_id
    collate = generation_collator(
        int(base.tokenizer.eos_token_id if pad is None else pad), features, embeddings
    )
    return _Reader(base, model, collate, dtype)


def _read(
    config: TsneConfig, layers: Sequence[Layer], instances: Instances, reader: _Reader, console: Console
) -> TaskSelections:
    label = f"the {instances.split} data of {instances.task}"
    items = encode_prompts(instances.records, reader.base, config.data.on_error, label).items
    if len(items) < 2:
        raise UserError(
            f"tasks={instances.task}: {len(items)} of its instances could be read, a map needs at least 2"
        )
    if config.tsne.routing_seed is not None:
        # Each task has its own draws: which others are read before it changes none of them.
        torch.manual_seed(_number(f"{config.tsne.routing_seed}/{instances.split}/{instances.task}"))
    rows: dict[tuple[str, str], list[Ints]] = {(layer.name, side): [] for layer in layers for side in _SIDES}
    order: list[Item] = []
    with matrix_products_in(reader.model, reader.dtype, reader.model.device.type):
        for batch in with_bar(batches(items, config.tsne.batch_size), f"reading {instances.task}", console):
            found = selections_at_prompt(reader.model, batch, reader.collate)
            for layer in layers:
                selection = found[layer.name]
                rows[layer.name, "a"].append(selection.index_a.cpu().numpy())
                rows[layer.name, "b"].append(selection.index_b.cpu().numpy())
            order += batch
    by_index = np.argsort([item.index for item in order], kind="stable")
    return TaskSelections(
        [order[place].index for place in by_index],
        {key: np.concatenate(parts)[by_index] for key, parts in rows.items()},
    )


def _fingerprint(
    config: TsneConfig, source: Source, routing: TaskRouting | None, dtype: torch.dtype
) -> dict[str, str]:
    """What all tasks' selections depend on, as far as it is known without the model."""
    settings = config.tsne
    found = {
        "version": __version__,
        "model": _model_mark(source.subject.model),
        "number format": str(dtype).removeprefix("torch."),
        "adapter": adapter_digest(source.folder),
        "layers": f"{settings.linear} x {len(source.layers)}",
        "pictures": "tower features, cached in fp16" if settings.cache_features else "pixels",
    }
    if routing is not None:
        found["task definitions"] = _digest([routing.encoder, sorted(routing.definitions.items())])
    if source.adapter.routing == "random":
        found["draws"] = f"seed {settings.routing_seed}, batches of {settings.batch_size}"
    return found


def _model_mark(model: ModelConfig) -> str:
    """Of a model's settings, and of the files of a local folder; the base's own fingerprint needs it loaded."""
    folder = None
    if model.source == "prepared":
        folder = prepared_folder(model)
    elif model.name_or_path is not None and Path(model.name_or_path).is_dir():
        folder = Path(model.name_or_path)
    parts: list[object] = [asdict(model)]
    if model.source == "mini":
        parts += [mini.sources(), hashlib.sha256(ASSET.read_bytes()).hexdigest()]
    files = [] if folder is None else sorted(path for path in folder.iterdir() if path.is_file())
    marks = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return _digest([*parts, marks])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
