"""`mixlora export`: from a MixLoRA run to static LoRA adapters for stock PEFT, and what they lose."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import set_seed

from mixlora_cli.analysis.export.comparison import (
    BASE,
    KINDS,
    MEAN,
    MIXLORA,
    STATIC,
    Answers,
    Measure,
    answer,
    compare,
    make_examples,
)
from mixlora_cli.analysis.export.fit import (
    Energies,
    MeanUpdate,
    Moments,
    Pools,
    expected_at_random,
    observed,
    total,
)
from mixlora_cli.config import ExportConfig, FitConfig
from mixlora_cli.data.encode import Item, encode_prompts
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError, cut, hint_at
from mixlora_cli.evaluation.instances import benchmark_of, grouped, stratified
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.layer import MixLoraLinear
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.models.adapters import ADAPTER_WEIGHTS
from mixlora_cli.models.generate import batches
from mixlora_cli.models.load import build_base
from mixlora_cli.models.session import (
    ADAPTER,
    Run,
    Session,
    about_mixlora,
    find_mixlora,
    refuse_adapter_folder,
)
from mixlora_cli.output import LOCK, alone_in
from mixlora_cli.progress import say, with_bar
from mixlora_cli.stats import Estimate
from mixlora_cli.store import readable_as_usual, write_json
from mixlora_cli.tables import Cell, Table, show
from mixlora_cli.training.run_folder import versions

FILE_NAME = "export.json"
FORMAT = "mixlora-export/1"
ALL_INPUTS = "adapter"
"""Folder of the adapter that is fitted to all inputs together."""
Split = Literal["heldout", "unseen"]
Records = Mapping[str, list[Record]]
"""By task, or by benchmark where they have one."""


def export(config: ExportConfig) -> Path:
    """Write the static adapters and `export.json` into `config.output_dir`, which is returned.

    Raises:
        UserError: there is no finished MixLoRA adapter, the output folder is taken, or the data does not fit. Found
            before a model is loaded.
    """
    folder = Path(config.output_dir).expanduser()
    run, source, adapter = _find(config)
    with alone_in(folder, "export"):
        _export(config, folder, run, source, adapter)
    return folder


def _export(config: ExportConfig, folder: Path, run: Run, source: Path, adapter: MixLoraConfig) -> None:
    settings, on_error = config.export, config.data.on_error
    console = Console(stderr=True, soft_wrap=True)
    _check_output(folder, config.overwrite)
    by_chance = adapter.router.source == "chance"
    fitted, compared, compared_split = choose_inputs(config, input_matters=not by_chance)
    tasks = {record.task for group in (fitted, compared) for records in group.values() for record in records}
    routing = run.task_routing(config.data, tasks)
    _say_what_to_know(adapter, console)

    base = build_base(run.model, run.dtype)
    prompts = {
        task: encode_prompts(records, base.chat, on_error, f"the {settings.split} data of {task}").items
        for task, records in fitted.items()
        if not by_chance
    }
    examples = {task: make_examples(task, records, base, on_error) for task, records in compared.items()}
    session = Session(base, run.dtype, settings.cache_features, routing=routing)
    answers = {BASE: answer(session, examples, settings)}

    # A prompt is all that inference pools, so `all` and `prompt` are one there. `prompt` makes the pass that reads the
    # true answer, too, for its loss, select as generation does.
    session.put_on(source, replace(adapter, pool="prompt"))
    assert session.tuner is not None
    set_seed(config.seed)  # routing=random draws
    pools = _read_pools(session.tuner, adapter.scaling)
    if by_chance:
        at_random = {
            name: expected_at_random(pool.gram_a, pool.gram_b, adapter.r) for name, pool in pools.items()
        }
        moments = {ALL_INPUTS: at_random}
    else:
        moments = _collect(
            session, prompts, pools, settings.batch_size, alike=adapter.router.source == "task"
        )
    answers[MIXLORA] = answer(session, examples, settings)
    session.take_off()

    groups = {name: [task] for task, name in folder_names(prompts).items()}
    groups = groups if settings.per_task else {ALL_INPUTS: list(prompts)}
    _begin_output(folder, list(groups))
    named = replace(
        adapter,
        base_model_name_or_path=adapter.base_model_name_or_path
        or run.model.name_or_path
        or base.model.name_or_path
        or base.name,
        revision=adapter.revision or run.model.revision,
    )
    adapters: list[dict[str, Any]] = []
    static: dict[str, Answers] = {}
    for name, members in groups.items():
        chosen = [moments[task] for task in members] or list(moments.values())
        updates = {layer: MeanUpdate(pool, total(m[layer] for m in chosen)) for layer, pool in pools.items()}
        rank = settings.rank or max(1, *(update.rank for update in updates.values()))
        _write_static_lora(folder / name, named, rank, updates, source)
        energies = {layer: update.energies(rank) for layer, update in updates.items()}
        adapters.append(
            {
                "folder": name,
                "tasks": members,
                "instances": {task: len(prompts[task]) for task in members},
                "rank": rank,
                "energy": _shares(reduce(Energies.__add__, energies.values())),
                "layers": {layer: _shares(each) for layer, each in energies.items()},
            }
        )
        if examples:  # each task is answered with the adapter meant for it, as read back from its folder
            session.put_on(folder / name)
            own = {task: asked for task, asked in examples.items() if task in members or not members}
            static |= answer(session, own, settings)
            session.take_off()
    measures = compare({**answers, STATIC: static}) if examples else []

    content = {
        "format": FORMAT,
        "finished": True,
        "run": str(config.run),
        "label": run.label,
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "adapter": about_mixlora(run, adapter),
        "number format": str(run.dtype).removeprefix("torch."),
        "fitted": {"split": settings.split, "per_task": settings.per_task, "seed": config.seed},
        "compared": {
            "split": compared_split,
            "instances": {task: len(asked) for task, asked in examples.items()},
        },
        "versions": versions(),
        "adapters": adapters,
        "comparison": [_measure(measure) for measure in measures] or None,
    }
    write_json(folder / FILE_NAME, content)
    show([_energy_table(adapters), *map(_measure_table, measures)])
    say(f"adapters and export.json are in {folder}", console)


def _find(config: ExportConfig) -> tuple[Run, Path, MixLoraConfig]:
    """The adapter, its folder and its configuration; UserError where it cannot be exported as it is asked for."""
    assert config.run is not None  # the configuration's own check
    run, folder, adapter = find_mixlora(
        config.run,
        config.model,
        own_weights="they are static already, there is nothing to export",
        other_kind="is static already: serve {folder} as it is",
    )
    rank = config.export.rank
    if rank is not None and rank > adapter.factors:
        raise UserError(
            f"export.rank={rank}: must be <= {adapter.factors}, the factors in a pool; the mean update has no more"
        )
    if adapter.router.source == "chance" and config.export.per_task:
        raise UserError(
            "export.per_task=true: with routing=random chance selects alike for every task, so all adapters would be "
            "one; give export.per_task=false"
        )
    return run, folder, adapter


def _check_output(folder: Path, overwrite: bool) -> None:
    """Raise UserError unless an export may be written into `folder`."""
    refuse_adapter_folder(folder)
    if not folder.is_dir() or {path.name for path in folder.iterdir()} <= {LOCK}:
        return
    if not (folder / FILE_NAME).is_file():
        raise UserError(f"output_dir={folder} holds files that no export wrote; give a folder of its own")
    if not overwrite:
        raise UserError(
            f"output_dir={folder} holds an export; choose another output_dir=, or overwrite=true to replace it"
        )
    _adapters_in(folder / FILE_NAME)


def _begin_output(folder: Path, adapters: Sequence[str]) -> None:
    """Remove an earlier export's adapters and note the names of those to come; other files stay."""
    file = folder / FILE_NAME
    if file.is_file():
        for name in _adapters_in(file):
            shutil.rmtree(folder / name, ignore_errors=True)
    write_json(file, {"format": FORMAT, "finished": False, "adapters": [{"folder": n} for n in adapters]})


def _adapters_in(file: Path) -> list[str]:
    """Names of the adapter folders that an export wrote beside `file`; UserError where it is another's file."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        names = [str(entry["folder"]) for entry in content["adapters"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no file of this version's export: move it away, or give another output_dir="
        ) from error
    return [name for name in names if name == Path(name).name and name not in ("", ".", "..")]


def choose_inputs(config: ExportConfig, input_matters: bool = True) -> tuple[Records, Records, Split]:
    """Seeded samples of what is fitted to and of what is compared on (never the same ones), and the latter's split.

    Instances to fit to come from `export.split`, those to compare on from the held-out ones, or from the unseen ones
    where the fit does; from one split at most half are fitted to.

    Args:
        input_matters: False where chance selects: without a comparison, no data is read.

    Raises:
        UserError: an unknown task, or too few instances of one to do both.
    """
    settings, split = config.export, config.export.split
    compared_split: Split = "unseen" if split == "unseen" else "heldout"
    if not (input_matters or settings.evaluate):
        return {}, {}, compared_split
    available = _wanted(grouped(load_records(config.data, split, config.seed), benchmark_of), settings)
    if settings.evaluate and split == compared_split:
        fitted, rest = _halves(available, settings, config.seed)
    else:
        fitted = {task: stratified(r, settings.instances, config.seed) for task, r in available.items()}
        rest = _heldout(config, list(available)) if settings.evaluate else {}
    if settings.limit is not None:
        rest = {task: stratified(records, settings.limit, config.seed) for task, records in rest.items()}
    return fitted, rest, compared_split


def _wanted(available: Records, settings: FitConfig) -> Records:
    if settings.tasks is None:
        return dict(sorted(available.items()))
    for task in settings.tasks:
        if task not in available:
            hint = hint_at(task, available, "tasks")
            raise UserError(f"export.tasks={cut(task)}: no such task in the {settings.split} data; {hint}")
    return {task: available[task] for task in dict.fromkeys(settings.tasks)}


def _halves(available: Records, settings: FitConfig, seed: int) -> tuple[Records, Records]:
    fitted, rest = {}, {}
    for task, records in available.items():
        # Half of them, whatever `export.instances` says, remain to be answered.
        fitted[task] = stratified(records, max(min(settings.instances, len(records) // 2), 1), seed)
        used = {record.index for record in fitted[task]}
        rest[task] = [record for record in records if record.index not in used]
        if not rest[task]:
            raise UserError(
                f"export.split={settings.split}: task {cut(task)} has too few instances ({len(records)}) to "
                "fit to some and compare on others; leave it out of export.tasks, or export.evaluate=false"
            )
    return fitted, rest


def _heldout(config: ExportConfig, tasks: Sequence[str]) -> Records:
    if config.data.source == "json" and config.data.heldout is None:
        raise UserError(
            "data.heldout=null: comparing needs held-out records; give data.heldout=<file>, or export.evaluate=false"
        )
    heldout = grouped(load_records(config.data, "heldout"), benchmark_of)
    if missing := [task for task in tasks if task not in heldout]:
        raise UserError(
            f"the held-out data has no instance of {', '.join(missing)}: choose others with export.tasks, "
            "or export.evaluate=false"
        )
    return {task: heldout[task] for task in tasks}


def _say_what_to_know(adapter: MixLoraConfig, console: Console) -> None:
    if adapter.router.source == "chance":
        say(
            "note: routing=random: the export is the exact expectation over all choices; no input changes it",
            console,
        )
    elif adapter.decode == "step":
        say(
            "note: decode=step: this adapter selects anew for each decoded token; the export has the prompt's "
            "selection",
            console,
        )
    if adapter.modules_to_save:
        names = ", ".join(adapter.modules_to_save)
        say(
            f"note: {names}: trained whole and exported whole; servers that take low-rank weights alone refuse it",
            console,
        )


def _read_pools(tuner: MixLoraModel, scaling: float) -> dict[str, Pools]:
    """The pools of every adapted layer, by the layer's name in the base model."""
    return {
        name: Pools(
            layer.mixlora_factors_a[ADAPTER].weight,  # type: ignore[arg-type]  # a FactorPool's Parameter
            layer.mixlora_factors_b[ADAPTER].weight,  # type: ignore[arg-type]
            scaling,
        )
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, MixLoraLinear)
    }


def _collect(
    session: Session,
    prompts: Mapping[str, Sequence[Item]],
    pools: Mapping[str, Pools],
    batch_size: int,
    alike: bool,
) -> dict[str, dict[str, Moments]]:
    """Moments of every layer over the prompts of each task; where all of a task are `alike`, its first is read."""
    found = {}
    for task, items in with_bar(prompts.items(), "reading prompts"):
        read = items[:1] if alike else items
        parts: dict[str, list[Moments]] = {name: [] for name in pools}
        for batch in batches(read, batch_size):
            selections = session.selections(batch)
            for name, pool in pools.items():
                parts[name].append(observed(selections[name], pool.gram_a, pool.gram_b))
        copies = len(items) // len(read)
        found[task] = {name: total(of_layer).times(copies) for name, of_layer in parts.items()}
    return found


def folder_names(tasks: Iterable[str]) -> dict[str, str]:
    """A folder name for each task: characters that file systems dislike become "_", and no two are alike."""
    names: dict[str, str] = {}
    for task in tasks:
        plain = name = re.sub(r"[^\w+-]+", "_", task).strip("_") or "task"
        taken = {other.lower() for other in names.values()}
        number = 2
        while name.lower() in taken:
            name, number = f"{plain}-{number}", number + 1
        names[task] = name
    return names


def _write_static_lora(
    folder: Path, adapter: MixLoraConfig, rank: int, updates: Mapping[str, MeanUpdate], source: Path
) -> None:
    """Write LoRA at scale alpha / r = 1 on the layers that `adapter`, in `source`, has.

    What is not the method's own in `source` goes along: a projector that was trained with it.
    """
    targets = adapter.target_modules or updates  # else PEFT knew them by its table of architectures
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else sorted(targets),
        exclude_modules=adapter.exclude_modules,
        modules_to_save=adapter.modules_to_save,
        base_model_name_or_path=adapter.base_model_name_or_path,
        revision=adapter.revision,
        inference_mode=True,
    )
    config.auto_mapping = adapter.auto_mapping
    trained = load_file(source / ADAPTER_WEIGHTS)
    weights = {name: tensor for name, tensor in trained.items() if f".{MixLoraModel.prefix}" not in name}
    for layer, update in updates.items():
        lora_a, lora_b = update.factors(rank)
        weights[f"base_model.model.{layer}.lora_A.weight"] = lora_a
        weights[f"base_model.model.{layer}.lora_B.weight"] = lora_b
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    readable_as_usual(folder / ADAPTER_WEIGHTS)


def _shares(energies: Energies) -> dict[str, float]:
    names = ("selected", "lost_by_averaging", "kept_by_rank", "kept_in_all")
    return {name: getattr(energies, name) for name in names}


def _measure(measure: Measure) -> dict[str, Any]:
    def nested(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        tasks = {task: {**asdict(e), "n": measure.counts[task]} for task, e in estimates.items()}
        return {"mean": tasks.pop(MEAN), "tasks": tasks}

    return {
        "name": measure.name,
        "unit": measure.unit,
        "rule": measure.rule,
        "adapter kind": {kind: nested(estimates) for kind, estimates in measure.kinds.items()},
        f"{STATIC} - {MIXLORA}, paired": nested(measure.difference),
    }


def _energy_table(adapters: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each adapter: all layers together, and the layer that keeps least."""
    rows = []
    for adapter in adapters:
        _, *shares = adapter["energy"].values()
        shares.append(min(layer["kept_in_all"] for layer in adapter["layers"].values()))
        inputs = str(sum(adapter["instances"].values())) if adapter["instances"] else "any"
        rows.append((adapter["folder"], str(adapter["rank"]), inputs, *(f"{100 * s:.1f} %" for s in shares)))
    headings = ("adapter", "rank", "inputs", "lost by averaging", "kept by rank", "kept in all")
    note = (
        "Shares of the selected updates' squared Frobenius norm. Lost by averaging: how far instances' updates lie "
        "from their mean."
    )
    return Table("Static adapters", (*headings, "least in a layer"), tuple(rows), notes=(note,))


def _measure_table(measure: Measure) -> Table:
    """A row for each task and their mean: every adapter kind, and the paired difference."""
    digits = 1 if measure.unit == "%" else 3
    title = f"Held-out instances: {measure.name} ({measure.unit}) [95 % interval]"
    rows: list[tuple[Cell | str, ...]] = []
    for task in measure.difference:
        estimates = [*(measure.kinds[kind][task] for kind in KINDS), measure.difference[task]]
        cells = [Cell(f"{e.value:.{digits}f}", e.interval_text(digits)) for e in estimates]
        rows.append((cut(task) if task != MEAN else "mean", *cells))
    return Table(title, ("task", *KINDS, f"{STATIC} - {MIXLORA}"), tuple(rows), last_apart=True)
