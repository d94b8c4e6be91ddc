"""Whose selections are read, and in which layers; from instances to selections on the disk, task by task.

    <folder>/<task>-<hash>.parquet    index, id, split, task, layer, block, side, factors

One row for each instance, layer and side; `factors` is the list of selected factors, best first. The file's metadata
says what the selections depend on, and is compared before they are used: what is there already is not read again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from safetensors import safe_open

from mixlora_cli import __version__
from mixlora_cli.benchmarks.registry import BENCHMARKS, benchmark_named, in_paper_order
from mixlora_cli.config import DataConfig, ModelConfig, TsneConfig
from mixlora_cli.data.definitions import load_definitions
from mixlora_cli.data.encode import encode_prompts
from mixlora_cli.data.loading import load_records, locate_files
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError, cut, did_you_mean, hint_at
from mixlora_cli.evaluation.fingerprint import records_digest
from mixlora_cli.evaluation.instances import benchmark_of, grouped, stratified
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.models import mini
from mixlora_cli.models.adapters import ADAPTER_WEIGHTS
from mixlora_cli.models.definitions import TaskRouting
from mixlora_cli.models.features import pictures_from
from mixlora_cli.models.generate import batches
from mixlora_cli.models.load import build_base, prepared_folder
from mixlora_cli.models.session import Run, Session, find_mixlora
from mixlora_cli.models.skeleton import build_skeleton
from mixlora_cli.paths import STAGE_ONE
from mixlora_cli.progress import say, with_bar
from mixlora_cli.store import atomic, digest_of

Ints = npt.NDArray[np.int64]
Split = Literal["unseen", "heldout"]
SIDES = ("a", "b")
_NOT_IN_FIG_5 = "MME"
_LISTED = 20
_WEIGHT = re.compile(r"(?:base_model\.model\.)?((.*?)\.(\d+)\.(?:.*\.)?(\w+))\.mixlora_factors_a\b.*")
_KEY = b"mixlora"
_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("layer", pa.string()),
        ("block", pa.int32()),
        ("side", pa.string()),
        ("factors", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Layer:
    """One adapted linear layer of the language model."""

    block: int
    """Number of its block, from 0."""
    name: str
    """In the base model."""


def find_layers(config: TsneConfig) -> tuple[Run, MixLoraConfig, list[Layer], list[Layer]]:
    """The run, its adapter, and of the adapter's layers those named `tsne.linear`, by block, and those that are drawn.

    Raises:
        UserError: there is no finished MixLoRA adapter, chance selects without a seed, or a layer is not adapted.
    """
    assert config.run is not None  # the configuration's own check
    run, folder, adapter = find_mixlora(
        config.run,
        config.model,
        own_weights="nothing is selected there; give a MixLoRA run",
        other_kind="selects nothing: every instance gets the same update; give a MixLoRA run",
    )
    if run.selects_by == "chance" and config.tsne.routing_seed is None:
        raise UserError(
            f"run={config.run} routes by chance, of which a map shows nothing but the draws: give "
            "tsne.routing_seed=<number> to have one all the same"
        )
    layers = _layers(folder, config.tsne.linear, run.model)
    return run, adapter, layers, choose_layers(layers, config.tsne.layers)


def _layers(folder: Path, linear: str, model: ModelConfig) -> list[Layer]:
    """The decoder's adapted layers of this kind, by block, from the names of the adapter's weights."""
    try:
        with safe_open(str(folder / ADAPTER_WEIGHTS), framework="pt") as weights:
            found = [match for key in weights.keys() if (match := _WEIGHT.fullmatch(key))]  # noqa: SIM118
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS}: cannot be read as an adapter's weights ({error})"
        ) from None
    if len({match[2] for match in found}) > 1:  # a tower is adapted, too, and its blocks have numbers as well
        skeleton = build_skeleton(model)
        decoder = skeleton.get_decoder()
        prefix = next(name for name, module in skeleton.named_modules() if module is decoder)
        found = [match for match in found if match[1].startswith(f"{prefix}.")]
    kinds = sorted({match[4] for match in found})
    if linear not in kinds:
        raise UserError(
            f"tsne.linear={linear}: this adapter has {', '.join(kinds) or 'no numbered layers'}"
            f"{did_you_mean(linear, kinds)}"
        )
    layers = [Layer(int(match[3]), match[1]) for match in found if match[4] == linear]
    return sorted(layers, key=lambda layer: layer.block)


def choose_layers(layers: Sequence[Layer], wanted: Sequence[int] | None) -> list[Layer]:
    """Those of the wanted blocks, in their order; without a wish the first, the middle and the last.

    Raises:
        UserError: a block has no such layer.
    """
    if wanted is None:
        last = len(layers) - 1
        return [layers[place] for place in sorted({0, last // 2, last})]
    by_block = {layer.block: layer for layer in layers}
    for block in wanted:
        if block not in by_block:
            raise UserError(
                f"tsne.layers={block}: the adapter has no such layer; it has {layers[0].block} to {layers[-1].block}"
            )
    return [by_block[block] for block in dict.fromkeys(wanted)]


@dataclass(frozen=True)
class Instances:
    """The sample of one task."""

    task: str
    split: Split
    records: Sequence[Record]
    available: int
    """Instances that the split has of it."""
    images: Path | None
    """Folder that holds the pictures."""


def choose_instances(config: TsneConfig) -> list[Instances]:
    """Seeded samples of the tasks in the order that they were named, or in the paper's.

    A name that both splits have means the unseen one.

    Raises:
        UserError: a task is unknown or has too few instances, or there are fewer than two tasks.
    """
    data = replace(config.data, tasks=None)
    wanted = config.tasks
    if config.pairs is not None:
        wanted = [task for side in zip(*config.pairs, strict=True) for task in side]
    found: dict[str, tuple[Split, list[Record]]] = {}
    for split, groups in _groups(data, only_unseen=wanted is None):
        found = {task: (split, records) for task, records in groups.items()} | found
        if wanted is not None and all(task in found for task in wanted):
            break
    if wanted is None:
        wanted = [t for t in in_paper_order(found) if benchmark_named(t).column != _NOT_IN_FIG_5]
        if len(wanted) < 2:
            raise UserError(
                f"the unseen data has one task alone ({', '.join(map(cut, found))}), and a map of one "
                "compares it with nothing: name two or more with tasks=[...]"
            )
    chosen = []
    for task in dict.fromkeys(wanted):
        if task not in found:
            raise UserError(_unknown(task, list(found), data))
        split, records = found[task]
        if len(records) < 2:
            raise UserError(
                f"tasks={cut(task)}: the {split} data has 1 instance of it, a map needs at least 2"
            )
        sample = stratified(records, config.tsne.instances, config.seed)
        chosen.append(Instances(task, split, sample, len(records), locate_files(data, split).pictures))
    return chosen


def _groups(data: DataConfig, only_unseen: bool) -> Iterator[tuple[Split, dict[str, list[Record]]]]:
    """Records by task of each split that the data has; a split is read when it is asked for."""
    if not _absent(data, "unseen"):
        yield "unseen", grouped(load_records(data, "unseen"), benchmark_of)
    elif only_unseen:
        raise UserError(
            "data.unseen=null: without tasks=[...] the unseen benchmarks are drawn; give data.unseen=<file>, or "
            "name held-out tasks"
        )
    if not only_unseen and not _absent(data, "heldout"):
        yield "heldout", grouped(load_records(data, "heldout"), lambda record: record.task)


def _absent(data: DataConfig, split: str) -> bool:
    return not data.is_built_in and getattr(data, split) is None


def _unknown(task: str, available: Sequence[str], data: DataConfig) -> str:
    names = sorted(available)
    without = [f"data.{split}=null" for split in ("unseen", "heldout") if _absent(data, split)]
    reason = f" ({' and '.join(without)})" if without else ""
    if task in BENCHMARKS or task in load_definitions(data):
        return (
            f"tasks={cut(task)}: the unseen and the held-out data have no instance of it{reason}; "
            f"there are: {', '.join(map(cut, names[:_LISTED])) or 'none'}"
        )
    hint = hint_at(task, names, "tasks")
    return f"tasks={cut(task)}: no such task in the unseen and the held-out data{reason}; {hint}"


@dataclass(frozen=True)
class Selections:
    """What one task's instances select."""

    indices: Sequence[int]
    """`Record.index` of each instance."""
    factors: Mapping[tuple[str, str], Ints]
    """By (layer name, side): factors (n, r) of the instances, best first."""


class SelectionStore:
    """The files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, instances: Instances) -> Path:
        digest = hashlib.sha256(f"{instances.split}/{instances.task}".encode()).hexdigest()[:8]
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.+-]+', '_', instances.task)[:60]}-{digest}.parquet"

    def base_of(self, instances: Instances, fingerprint: Mapping[str, str]) -> str | None:
        """Fingerprint of the base that a task was read with; None where there is no file that fits `fingerprint`."""
        try:
            metadata = pq.read_schema(self.path(instances)).metadata or {}
            about = json.loads(metadata[_KEY])
            return str(about["base"]) if about["fingerprint"] == dict(fingerprint) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(
        self,
        instances: Instances,
        layers: Sequence[Layer],
        selections: Selections,
        fingerprint: Mapping[str, str],
        base: str,
    ) -> None:
        """Keep a task's selections: complete on the disk, or not there at all."""
        ids = {record.index: record.id for record in instances.records}
        rows = [
            {
                "index": index,
                "id": ids[index],
                "split": instances.split,
                "task": instances.task,
                "layer": layer.name,
                "block": layer.block,
                "side": side,
                "factors": factors,
            }
            for layer in layers
            for side in SIDES
            for index, factors in zip(
                selections.indices, selections.factors[layer.name, side].tolist(), strict=True
            )
        ]
        about = json.dumps({"fingerprint": dict(fingerprint), "base": base}).encode()
        with atomic(self.path(instances)) as temp:
            table = pa.Table.from_pylist(rows, _SCHEMA.with_metadata({_KEY: about}))
            pq.write_table(table, temp, compression="zstd")

    def read(self, instances: Instances, layers: Sequence[Layer], sides: Sequence[str]) -> Selections:
        """A task's selections in these layers, all in one order."""
        table = pq.read_table(self.path(instances), columns=["index", "layer", "side", "factors"])
        index, layer, side, factors = (np.array(column.to_pylist()) for column in table.columns)
        places = {(one.name, s): (layer == one.name) & (side == s) for one in layers for s in sides}
        (order, *_) = (index[place].tolist() for place in places.values())
        return Selections(order, {key: factors[place].astype(np.int64) for key, place in places.items()})


def read_missing(
    config: TsneConfig,
    run: Run,
    layers: Sequence[Layer],
    chosen: Sequence[Instances],
    store: SelectionStore,
    console: Console,
) -> int:
    """Read the tasks that `store` does not have as the settings want them; returns how many those were.

    Selections of all blocks are kept, so that other layers of the same kind can be drawn without the model.

    Raises:
        UserError: the model cannot be built, a task has no definition, or none of its instances can be read.
    """
    routing = run.task_routing(config.data, {r.task for instances in chosen for r in instances.records})
    common = _fingerprint(config, run, len(layers), routing)
    wanted = [
        common | {"records": records_digest(one.records, one.images), "split": one.split} for one in chosen
    ]
    bases = [store.base_of(one, fingerprint) for one, fingerprint in zip(chosen, wanted, strict=True)]
    if None not in bases and len(set(bases)) == 1:
        return 0
    base = build_base(run.model, run.dtype)
    session = Session(base, run.dtype, config.tsne.cache_features, run.adapter, routing)
    missing = [number for number, fingerprint in enumerate(bases) if fingerprint != base.fingerprint]
    if len(missing) < len(chosen):
        say(f"{len(chosen) - len(missing)} of {len(chosen)} tasks were read before", console)
    for number in missing:
        try:
            found = _read(config, layers, chosen[number], session, console)
        except KeyboardInterrupt:
            say("stopped: the same command goes on with the tasks that are left", console)
            raise
        store.write(chosen[number], layers, found, wanted[number], base.fingerprint)
    return len(missing)


def _fingerprint(
    config: TsneConfig, run: Run, num_layers: int, routing: TaskRouting | None
) -> dict[str, str]:
    """What all tasks' selections depend on, as far as it is known without the model."""
    settings = config.tsne
    found = {
        "version": __version__,
        "model": _model_digest(run.model),
        "number format": str(run.dtype).removeprefix("torch."),
        "adapter": run.digest,
        "layers": f"{settings.linear} x {num_layers}",
        "pictures": pictures_from(settings.cache_features),
    }
    if routing is not None:
        found["task definitions"] = digest_of([routing.encoder, sorted(routing.definitions.items())])
    if run.selects_by == "chance":
        found["draws"] = f"seed {settings.routing_seed}, batches of {settings.batch_size}"
    return found


def _model_digest(model: ModelConfig) -> str:
    """Of a model's settings, and of the files of a local folder; the base's own fingerprint needs it loaded."""
    folder = None
    if model.source == "prepared":
        folder = prepared_folder(model)
    elif model.name_or_path is not None and Path(model.name_or_path).is_dir():
        folder = Path(model.name_or_path)
    parts: list[object] = [asdict(model)]
    if model.source == "smollm":
        parts.append(mini.text_digest())
    if model.source == "mini":
        parts += [mini.sources(), hashlib.sha256(STAGE_ONE.read_bytes()).hexdigest()]
    files = [] if folder is None else sorted(path for path in folder.iterdir() if path.is_file())
    return digest_of([*parts, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]])


def _read(
    config: TsneConfig, layers: Sequence[Layer], instances: Instances, session: Session, console: Console
) -> Selections:
    label = f"the {instances.split} data of {instances.task}"
    items = encode_prompts(instances.records, session.base.chat, config.data.on_error, label).items
    if len(items) < 2:
        raise UserError(
            f"tasks={instances.task}: {len(items)} of its instances could be read, a map needs at least 2"
        )
    if config.tsne.routing_seed is not None:
        # Each task has its own draws: which others are read before it changes none of them.
        name = f"{config.tsne.routing_seed}/{instances.split}/{instances.task}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    rows: dict[tuple[str, str], list[Ints]] = {(layer.name, side): [] for layer in layers for side in SIDES}
    order: list[int] = []
    for batch in with_bar(batches(items, config.tsne.batch_size), f"reading {instances.task}", console):
        found = session.selections(batch)
        for layer in layers:
            rows[layer.name, "a"].append(found[layer.name].index_a.cpu().numpy())
            rows[layer.name, "b"].append(found[layer.name].index_b.cpu().numpy())
        order += [item.index for item in batch]
    by_index = np.argsort(order, kind="stable")
    factors = {key: np.concatenate(parts)[by_index] for key, parts in rows.items()}
    return Selections([order[place] for place in by_index], factors)
