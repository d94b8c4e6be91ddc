"""`mixlora export`: from a MixLoRA run to static LoRA adapters for stock PEFT and servers, and what they lose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich.console import Console
from transformers import set_seed

from mixlora_cli.analysis.export.centroids import (
    Grouping,
    agreement_of,
    answers_of_centroids,
    make_centroids,
)
from mixlora_cli.analysis.export.comparison import (
    BASE,
    MIXLORA,
    STATIC,
    Answers,
    ByTask,
    answer,
    answer_with,
    as_json,
    compare,
    kinds_table,
    make_examples,
    task_table,
)
from mixlora_cli.analysis.export.fit import (
    Energies,
    Moments,
    Pools,
    expected_at_random,
    fitted,
    observed,
    selected,
    total,
)
from mixlora_cli.analysis.export.folder import (
    ALL_INPUTS,
    FILE_NAME,
    FORMAT,
    ROUTER,
    Exported,
    begin_output,
    check_output,
    entry_of,
    folder_names,
    write_lora,
    write_serving,
)
from mixlora_cli.config import ExportConfig, FitConfig
from mixlora_cli.data.definitions import definitions_of, trained_definitions
from mixlora_cli.data.encode import Item, encode_prompts
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError, cut, hint_at
from mixlora_cli.evaluation.instances import benchmark_of, grouped, stratified
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.layer import MixLoraLinear
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.method.targets import output_layer
from mixlora_cli.models.definitions import TaskRouting
from mixlora_cli.models.generate import batches
from mixlora_cli.models.load import LoadedModel, build_base, checkpoint_source
from mixlora_cli.models.session import ADAPTER, Run, Session, about_mixlora, find_mixlora
from mixlora_cli.output import alone_in
from mixlora_cli.progress import say, with_bar
from mixlora_cli.store import write_json
from mixlora_cli.tables import Table, show
from mixlora_cli.training.run_folder import versions

Split = Literal["heldout", "unseen"]
Records = Mapping[str, list[Record]]
"""By task, or by benchmark where they have one."""


@dataclass(frozen=True)
class _Inputs:
    """Records that adapters are fitted to, and others to compare on."""

    sample: Records
    compared: Records
    compared_split: Split
    routing: TaskRouting | None
    """Definitions of their tasks, where the adapter routes by them."""


def export(config: ExportConfig) -> Path:
    """Write the static adapters, what serves them and `export.json` into `config.output_dir`, which is returned.

    Raises:
        UserError: there is no finished MixLoRA adapter, the output folder is taken, or the data does not fit. Found
            before a model is loaded, unless fewer instances than `export.centroids` select differently.
    """
    folder = Path(config.output_dir).expanduser()
    run, source, adapter = _find(config)
    with alone_in(folder, "export"):
        _export(config, folder, run, source, adapter)
    return folder


def _export(config: ExportConfig, folder: Path, run: Run, source: Path, adapter: MixLoraConfig) -> None:
    settings, on_error = config.export, config.data.on_error
    console = Console(stderr=True, soft_wrap=True)
    check_output(folder, config.overwrite)
    inputs = _choose(config, run, adapter)
    _say_what_to_know(adapter, console)

    base = build_base(run.model, run.dtype)
    prompts = {
        task: encode_prompts(records, base.chat, on_error, f"the {settings.split} data of {task}").items
        for task, records in inputs.sample.items()
        if adapter.router.source == "tokens"
    }
    examples = {
        task: make_examples(task, records, base, on_error) for task, records in inputs.compared.items()
    }
    session = Session(base, run.dtype, settings.cache_features, routing=inputs.routing)
    answers: dict[str, ByTask] = {BASE: answer(session, examples, settings)}

    # A prompt is all that inference pools, so `all` and `prompt` are one there. `prompt` makes the pass that reads the
    # true answer, too, for its loss, select as generation does.
    session.put_on(source, replace(adapter, pool="prompt"))
    assert session.tuner is not None
    set_seed(config.seed)  # routing=random draws
    pools = _read_pools(session.tuner, adapter.scaling)
    grouping: Grouping | None = None
    if settings.centroids is not None:
        grouping = make_centroids(session, pools, prompts, inputs.sample, examples, settings, config.seed)
        exports = grouping.exports
    elif adapter.router.source == "tokens":
        exports = _by_task_or_all(_collect(session, prompts, pools, settings.batch_size), pools, settings)
    elif adapter.router.source == "task":
        exports = _of_tasks(session, pools, inputs.sample, adapter, settings)
    else:
        at_random = {
            name: expected_at_random(pool.gram_a, pool.gram_b, adapter.r) for name, pool in pools.items()
        }
        exports = [Exported(ALL_INPUTS, [], {}, fitted(pools, at_random, settings.rank))]
    answers[MIXLORA] = answer(session, examples, settings)
    session.take_off()

    begin_output(folder, [each.folder for each in exports])
    named = replace(
        adapter,
        base_model_name_or_path=adapter.base_model_name_or_path
        or run.model.name_or_path
        or base.model.name_or_path
        or base.name,
        revision=adapter.revision or run.model.revision,
    )
    for each in exports:
        write_lora(folder / each.folder, named, each.lora, source)
    if examples and grouping is not None and grouping.all_inputs is not None:
        with TemporaryDirectory() as temp:
            write_lora(Path(temp), named, grouping.all_inputs, source)
            answers[STATIC] = answer_with(Path(temp), examples, session, settings)
        answers |= answers_of_centroids(folder, grouping, examples, session, settings)
    elif examples:  # each task is answered with the adapter meant for it, as read back from its folder
        static: dict[str, Answers] = {}
        for each in exports:
            own = {task: asked for task, asked in examples.items() if task in each.tasks or not each.tasks}
            static |= answer_with(folder / each.folder, own, session, settings)
        answers[STATIC] = static
    measures = compare(answers) if examples else []

    if grouping is not None:
        grouping.router.save(folder / ROUTER)
    command = write_serving(
        folder,
        run.model,
        base.name if run.model.source in ("mini", "tiny") else checkpoint_source(run.model),
        base.chat,
        exports,
        inputs.routing,
        adapter,
        _beside_decoder(base, pools),
        None if grouping is None else ROUTER,
    )
    agreement = None if grouping is None else agreement_of(grouping, examples)
    content = {
        "format": FORMAT,
        "finished": True,
        "run": str(config.run),
        "label": run.label,
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "adapter": about_mixlora(run, adapter),
        "number format": str(run.dtype).removeprefix("torch."),
        "fitted": {
            "split": settings.split,
            "per_task": settings.per_task,
            "centroids": settings.centroids,
            "seed": config.seed,
        },
        "compared": {
            "split": inputs.compared_split,
            "instances": {task: len(asked) for task, asked in examples.items()},
        },
        "versions": versions(),
        "adapters": [
            {
                **entry_of(each, None),
                "instances": each.instances,
                "energy": _shares(each.energy),
                "layers": {layer: _shares(energies) for layer, energies in each.lora.energies.items()},
            }
            for each in exports
        ],
        "router": agreement,
        "comparison": [as_json(measure) for measure in measures] or None,
    }
    write_json(folder / FILE_NAME, content)
    exact = _is_exact(adapter, settings)
    tables = [] if exact else [_energy_table(exports)]
    show([*tables, *map(task_table if grouping is None else kinds_table, measures)])
    if agreement is not None and len(exports) > 1:
        _say_agreement(agreement, console)
    if exact:
        what = f"{len(exports)} adapters of rank {adapter.r}"
        say(f"{what}: each is the MixLoRA adapter itself for its task, nothing is lost", console)
    say(command, console)
    say(f"adapters, what serves them and export.json are in {folder}", console)


def _find(config: ExportConfig) -> tuple[Run, Path, MixLoraConfig]:
    """The adapter, its folder and its configuration; UserError where it cannot be exported as it is asked for."""
    assert config.run is not None  # the configuration's own check
    run, folder, adapter = find_mixlora(
        config.run,
        config.model,
        own_weights="they are static already, there is nothing to export",
        other_kind="is static already: serve {folder} as it is",
    )
    rank, centroids, by = config.export.rank, config.export.centroids, adapter.router.source
    if rank is not None and rank > adapter.factors:
        raise UserError(
            f"export.rank={rank}: must be <= {adapter.factors}, the factors in a pool; the mean update has no more"
        )
    if by == "chance" and config.export.per_task:
        raise UserError(
            "export.per_task=true: with routing=random chance selects alike for every task, so all adapters would be "
            "one; give export.per_task=false"
        )
    if by == "chance" and centroids is not None:
        raise UserError(
            f"export.centroids={centroids}: with routing=random no input selects, so there are no groups of them; "
            "leave it out: one adapter is the exact expectation"
        )
    if by == "task" and centroids is not None:
        raise UserError(
            f"export.centroids={centroids}: with routing=task all instances of a task select alike; give "
            "export.per_task=true in its place, which loses nothing"
        )
    return run, folder, adapter


def _is_exact(adapter: MixLoraConfig, settings: FitConfig) -> bool:
    """Whether each adapter to be written has the factors that its task selects."""
    return adapter.router.source == "task" and settings.per_task and settings.rank in (None, adapter.r)


def _choose(config: ExportConfig, run: Run, adapter: MixLoraConfig) -> _Inputs:
    """What the export reads; UserError where there is too little of it."""
    settings, by = config.export, adapter.router.source
    if _is_exact(adapter, settings):
        routing = _routing_of_tasks(config, run)
        return _Inputs(*choose_compared(config, list(routing.definitions)), routing)
    # A task's embedding is that of its own definition, also where a benchmark has several tasks.
    key = (lambda record: record.task) if by == "task" else benchmark_of
    sample, compared, split = choose_inputs(config, input_matters=by != "chance", key=key)
    count = sum(map(len, sample.values()))
    if settings.centroids is not None and settings.centroids > count:
        raise UserError(f"export.centroids={settings.centroids}: must be <= {count}, the instances to fit to")
    tasks = {record.task for group in (sample, compared) for each in group.values() for record in each}
    return _Inputs(sample, compared, split, run.task_routing(config.data, tasks))


def _routing_of_tasks(config: ExportConfig, run: Run) -> TaskRouting:
    """Definitions of the wanted tasks, or of all tasks of the training, as the training had them.

    Raises:
        UserError: no task is known, or one has no definition.
    """
    trained = run.trained_routing
    assert trained is not None
    known = trained.definitions or trained_definitions(config.data)
    tasks = list(dict.fromkeys(config.export.tasks or known))
    if not tasks:
        raise UserError(
            "export.per_task=true: the training's tasks are not known here; give data.metadata=<file> with their "
            "definitions"
        )
    missing = [task for task in tasks if task not in known]
    known = {**known, **definitions_of(config.data, missing)} if missing else known
    return replace(trained, definitions={task: known[task] for task in tasks})


def choose_compared(config: ExportConfig, tasks: Sequence[str]) -> tuple[Records, Records, Split]:
    """As `choose_inputs`, where nothing is fitted: the instances of these tasks to compare on, if any are wanted."""
    split: Split = "unseen" if config.export.split == "unseen" else "heldout"
    rest = _others(config, tasks, split, lambda record: record.task) if config.export.evaluate else {}
    return {}, _limited(rest, config), split


def choose_inputs(
    config: ExportConfig, input_matters: bool = True, key: Callable[[Record], str] = benchmark_of
) -> tuple[Records, Records, Split]:
    """Seeded samples of what is fitted to and of what is compared on (never the same ones), and the latter's split.

    Instances to fit to come from `export.split`, those to compare on from the held-out ones, or from the unseen ones
    where the fit does; from one split at most half are fitted to.

    Args:
        input_matters: False where chance selects: without a comparison, no data is read.
        key: by what records are grouped.

    Raises:
        UserError: an unknown task, or too few instances of one to do both.
    """
    settings, split = config.export, config.export.split
    compared_split: Split = "unseen" if split == "unseen" else "heldout"
    if not (input_matters or settings.evaluate):
        return {}, {}, compared_split
    available = _wanted(grouped(load_records(config.data, split, config.seed), key), settings)
    if settings.evaluate and split == compared_split:
        fitted, rest = _halves(available, settings, config.seed)
    else:
        fitted = {task: stratified(r, settings.instances, config.seed) for task, r in available.items()}
        rest = _others(config, list(available), "heldout", key) if settings.evaluate else {}
    return fitted, _limited(rest, config), compared_split


def _limited(records: Records, config: ExportConfig) -> Records:
    limit = config.export.limit
    if limit is None:
        return records
    return {task: stratified(each, limit, config.seed) for task, each in records.items()}


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


def _others(
    config: ExportConfig, tasks: Sequence[str], split: Split, key: Callable[[Record], str]
) -> Records:
    """Instances of these tasks that are not fitted to."""
    what = {"heldout": "held-out", "unseen": "unseen"}[split]
    if config.data.source == "json" and getattr(config.data, split) is None:
        raise UserError(
            f"data.{split}=null: comparing needs {what} records; give data.{split}=<file>, or export.evaluate=false"
        )
    found = grouped(load_records(config.data, split), key)
    if missing := [task for task in tasks if task not in found]:
        raise UserError(
            f"the {what} data has no instance of {', '.join(missing)}: choose others with export.tasks, "
            "or export.evaluate=false"
        )
    return {task: found[task] for task in tasks}


def _say_what_to_know(adapter: MixLoraConfig, console: Console) -> None:
    if adapter.router.source == "chance":
        say(
            "note: routing=random: the export is the exact expectation over all choices; no input changes it",
            console,
        )
    elif adapter.decode == "step" and adapter.router.source == "tokens":
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
) -> dict[str, dict[str, Moments]]:
    """Moments of every layer over the prompts of each task."""
    found = {}
    for task, items in with_bar(prompts.items(), "reading prompts"):
        parts: dict[str, list[Moments]] = {name: [] for name in pools}
        for batch in batches(items, batch_size):
            selections = session.selections(batch)
            for name, pool in pools.items():
                parts[name].append(observed(selections[name], pool.gram_a, pool.gram_b))
        found[task] = {name: total(of_layer) for name, of_layer in parts.items()}
    return found


def _by_task_or_all(
    moments: Mapping[str, Mapping[str, Moments]], pools: Mapping[str, Pools], settings: FitConfig
) -> list[Exported]:
    """The mean update of each task, or of all tasks together; moments by task and layer."""
    groups = {name: [task] for task, name in folder_names(moments).items()}
    exports = []
    for name, tasks in groups.items() if settings.per_task else [(ALL_INPUTS, list(moments))]:
        together = {layer: total(moments[task][layer] for task in tasks) for layer in pools}
        counts = {task: int(next(iter(moments[task].values())).count) for task in tasks}
        exports.append(Exported(name, tasks, counts, fitted(pools, together, settings.rank)))
    return exports


def _of_tasks(
    session: Session, pools: Mapping[str, Pools], sample: Records, adapter: MixLoraConfig, settings: FitConfig
) -> list[Exported]:
    """What tasks select by their definitions: no instance is read. As it is where that is exact, else fitted."""
    assert session.tuner is not None and session.embeddings is not None
    layers = {name: layer for name, layer in session.tuner.model.named_modules() if name in pools}
    exact = _is_exact(adapter, settings)
    chosen = {
        task: {name: layer.select_by_task(ADAPTER, embedding[None]) for name, layer in layers.items()}
        for task, embedding in session.embeddings.items()
        if exact or task in sample
    }
    if exact:
        alpha = float(2 * adapter.factors if adapter.alpha is None else adapter.alpha)
        return [
            Exported(name, [task], {}, selected(pools, chosen[task], alpha))
            for task, name in folder_names(chosen).items()
        ]
    moments = {
        task: {
            name: observed(chosen[task][name], pool.gram_a, pool.gram_b).times(len(records))
            for name, pool in pools.items()
        }
        for task, records in sample.items()
    }
    return _by_task_or_all(moments, pools, settings)


def _beside_decoder(base: LoadedModel, layers: Mapping[str, Any]) -> bool:
    """Whether layers outside of the language model are among these."""
    head = output_layer(base.model)
    inside = {*base.model.get_decoder().modules(), *([] if head is None else [head])}
    return any(base.model.get_submodule(name) not in inside for name in layers)


def _shares(energies: Energies) -> dict[str, float]:
    names = ("selected", "lost_by_averaging", "kept_by_rank", "kept_in_all")
    return {name: getattr(energies, name) for name in names}


def _energy_table(exports: Sequence[Exported]) -> Table:
    """A row for each adapter: all layers together, and the layer that keeps least; several fitted ones together."""

    def row(name: str, rank: str, count: int, energy: Energies, least: str) -> tuple[str, ...]:
        _, *shares = _shares(energy).values()
        return (name, rank, str(count) if count else "any", *(f"{100 * s:.1f} %" for s in shares), least)

    counts = [sum(each.instances.values()) for each in exports]
    rows = [
        row(
            each.folder,
            str(each.lora.rank),
            count,
            each.energy,
            f"{100 * min(energies.kept_in_all for energies in each.lora.energies.values()):.1f} %",
        )
        for each, count in zip(exports, counts, strict=True)
    ]
    together = len(exports) > 1 and all(counts)
    if together:
        parts = [each.energy.times(count / sum(counts)) for each, count in zip(exports, counts, strict=True)]
        rows.append(row("together", "", sum(counts), reduce(Energies.__add__, parts), ""))
    headings = ("adapter", "rank", "inputs", "lost by averaging", "kept by rank", "kept in all")
    note = (
        "Shares of the selected updates' squared Frobenius norm. Lost by averaging: how far instances' updates lie "
        "from their mean."
    )
    return Table(
        "Static adapters", (*headings, "least in a layer"), tuple(rows), notes=(note,), last_apart=together
    )


def _say_agreement(agreement: Mapping[str, Any], console: Console) -> None:
    right, most = agreement["names the nearest"], agreement["always the most frequent"]
    say(
        f"the router names the nearest centroid for {100 * right['value']:.1f} % "
        f"[{100 * right['low']:.1f}, {100 * right['high']:.1f}] of {agreement['instances']} held-out instances; always "
        f"naming the most frequent one would be right for {100 * most:.1f} %",
        console,
    )
