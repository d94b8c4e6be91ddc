"""`mixlora export`: from a MixLoRA run to static LoRA adapters, and what they lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import set_seed

from mixlora_cli.analysis.export.collect import ByLayer, collect, random_moments, read_pools
from mixlora_cli.analysis.export.comparison import BASE, MIXLORA, STATIC, ByTask, compare
from mixlora_cli.analysis.export.exam import Model, Question, Reading, examine, make_questions
from mixlora_cli.analysis.export.fit import MeanUpdate, Pools
from mixlora_cli.analysis.export.inputs import Inputs, choose_inputs
from mixlora_cli.analysis.export.moments import total
from mixlora_cli.analysis.export.report import Exported, print_report, write_report
from mixlora_cli.analysis.export.source import begin_output, check_output, find_source
from mixlora_cli.analysis.export.static_lora import (
    folder_names,
    lora_config,
    modules_trained_whole,
    write_static_lora,
)
from mixlora_cli.config import ExportConfig
from mixlora_cli.data.collate import PixelLoader
from mixlora_cli.data.encode import Item, encode_prompts
from mixlora_cli.evaluation.fingerprint import adapter_digest
from mixlora_cli.evaluation.subject import MixLoraSubject
from mixlora_cli.models.adapters import load_adapter, unload_adapter
from mixlora_cli.models.build import build_base
from mixlora_cli.models.features import FeatureCache
from mixlora_cli.models.task_routing import TaskRouting, routing_of_adapter
from mixlora_cli.output import alone_in
from mixlora_cli.training.precision import choose_dtype, matrix_products_in
from mixlora_cli.training.run_folder import versions

ALL_INPUTS = "adapter"
"""Folder of the adapter that is fitted to all inputs together."""


@dataclass(frozen=True)
class _Work:
    """A loaded base and everything that is put to it."""

    config: ExportConfig
    source: MixLoraSubject
    reading: Reading
    dtype: torch.dtype
    prompts: Mapping[str, Sequence[Item]]
    """What the adapter is fitted to, by task; empty where no input matters."""
    questions: Mapping[str, Sequence[Question]]
    """What is compared on, by task; empty without a comparison."""


def export(config: ExportConfig) -> Path:
    """Write the static adapters and `export.json` into `config.output_dir`, which is returned.

    Raises:
        UserError: there is no finished MixLoRA adapter, the output folder is taken, or the data does not fit. Found
            before a model is loaded.
    """
    folder = Path(config.output_dir).expanduser()
    source = find_source(config)
    with alone_in(folder, "export"):
        return _export(config, folder, source)


def _export(config: ExportConfig, folder: Path, source: MixLoraSubject) -> Path:
    console = Console(stderr=True, soft_wrap=True)
    check_output(folder, config.overwrite)
    inputs = choose_inputs(config, input_matters=source.adapter.routing != "random")
    tasks = {
        r.task for group in (inputs.fitted, inputs.compared) for records in group.values() for r in records
    }
    routing = routing_of_adapter(source.folder, config.data, tasks)
    _say_what_to_know(source, console)

    work = _prepare(config, source, inputs, routing)
    answers = {BASE: _answers(work, work.reading.base.model, work.questions)}
    pools, moments, answers[MIXLORA] = _read_with_mixlora(work)
    adapters = _write_adapters(work, folder, pools, moments)
    answers[STATIC] = _answers_of_static(work, folder, adapters)

    measures = compare(answers) if work.questions else ()
    write_report(folder, _about(work, inputs), adapters, measures)
    print_report(adapters, measures)
    console.print(f"adapters and export.json are in {folder}", markup=False, highlight=False)
    return folder


def _prepare(
    config: ExportConfig, source: MixLoraSubject, inputs: Inputs, routing: TaskRouting | None
) -> _Work:
    """Load the base and encode what it will read."""
    settings, on_error = config.export, config.data.on_error
    dtype = choose_dtype(source.subject.precision)
    base = build_base(source.subject.model, dtype)
    fitted = {} if source.adapter.routing == "random" else inputs.fitted
    prompts = {
        task: encode_prompts(records, base, on_error, f"the {settings.split} data of {task}").items
        for task, records in fitted.items()
    }
    questions = {task: make_questions(task, r, base, on_error) for task, r in inputs.compared.items()}
    reading = Reading(
        base=base,
        # The cache changes the model, and definitions are read without an adapter: both come before it.
        features=FeatureCache(base) if settings.cache_features else PixelLoader(base.image_processor),
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        embeddings=None if routing is None else routing.embeddings(base),
    )
    if torch.cuda.is_available():
        module: torch.nn.Module = base.model
        module.cuda()
    return _Work(config, source, reading, dtype, prompts, questions)


def _answers(work: _Work, model: Model, questions: Mapping[str, Sequence[Question]]) -> ByTask:
    with matrix_products_in(model, work.dtype, model.device.type):
        return {task: examine(model, asked, work.reading) for task, asked in questions.items()}


def _read_with_mixlora(work: _Work) -> tuple[dict[str, Pools], dict[str, ByLayer], ByTask]:
    """The pools of every layer, the moments of its selections by task, and the answers; the adapter is off again."""
    # A prompt is all that inference pools, so `all` and `prompt` are one there. `prompt` makes the pass that reads the
    # true answer, too, for its loss, select as generation does.
    settings = replace(work.source.adapter, pool="prompt")
    model = load_adapter(work.reading.base.model, work.source.folder, settings)
    assert isinstance(model, PeftModel)
    set_seed(work.config.seed)  # routing=random draws
    pools = read_pools(model)
    if work.source.adapter.routing == "random":
        moments = {ALL_INPUTS: random_moments(pools, work.source.adapter.r)}
    else:
        with matrix_products_in(model, work.dtype, model.device.type):
            collate, batch_size = work.reading.prompts(), work.reading.batch_size
            moments = collect(model, work.prompts, pools, collate, batch_size)
    answers = _answers(work, model, work.questions)
    unload_adapter(model)
    return pools, moments, answers


def _write_adapters(
    work: _Work, folder: Path, pools: Mapping[str, Pools], moments: Mapping[str, ByLayer]
) -> list[Exported]:
    """One adapter for all tasks, or one for each."""
    tasks = list(work.prompts)
    if work.config.export.per_task:
        groups = {name: [task] for task, name in folder_names(tasks).items()}
    else:
        groups = {ALL_INPUTS: tasks}
    begin_output(folder, list(groups))
    others = modules_trained_whole(work.source.folder)
    model = work.source.subject.model
    base = model.name_or_path or work.reading.base.model.name_or_path or work.reading.base.name
    adapters = []
    for name, members in groups.items():
        chosen = [moments[task] for task in members] or list(moments.values())
        updates = {layer: MeanUpdate(pool, total(m[layer] for m in chosen)) for layer, pool in pools.items()}
        rank = work.config.export.rank or max(1, *(update.rank for update in updates.values()))
        settings = lora_config(work.source.adapter, pools, rank, base, model.revision)
        write_static_lora(folder / name, settings, updates, others)
        energies = {layer: update.energies(rank) for layer, update in updates.items()}
        instances = {task: len(work.prompts[task]) for task in members}
        adapters.append(Exported(name, members, instances, rank, energies))
    return adapters


def _answers_of_static(work: _Work, folder: Path, adapters: Sequence[Exported]) -> ByTask:
    """Each task's questions, answered with the adapter that is meant for it, as read back from its folder."""
    answers: ByTask = {}
    if not work.questions:
        return answers
    for adapter in adapters:
        model = load_adapter(work.reading.base.model, folder / adapter.folder)
        assert isinstance(model, PeftModel)
        own = {
            task: asked
            for task, asked in work.questions.items()
            if task in adapter.tasks or not adapter.tasks
        }
        answers = {**answers, **_answers(work, model, own)}
        unload_adapter(model)
    return answers


def _about(work: _Work, inputs: Inputs) -> dict[str, Any]:
    """What `export.json` says of where the adapters come from."""
    config, source, base = work.config, work.source, work.reading.base
    return {
        "run": str(config.run),
        "label": source.subject.label,
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "adapter": {
            "digest": adapter_digest(source.folder),
            "factors": source.adapter.factors,
            "rank": source.adapter.r,
            "routing": source.adapter.routing,
            "decode": source.adapter.decode,
        },
        "number format": str(work.dtype).removeprefix("torch."),
        "fitted": {"split": config.export.split, "per_task": config.export.per_task, "seed": config.seed},
        "compared": {
            "split": inputs.compared_split,
            "instances": {task: len(questions) for task, questions in work.questions.items()},
        },
        "versions": versions(),
    }


def _say_what_to_know(source: MixLoraSubject, console: Console) -> None:
    notes = []
    if source.adapter.routing == "random":
        notes.append(
            "routing=random: the export is the exact expectation over all choices; no input changes it"
        )
    elif source.adapter.decode == "step":
        notes.append(
            "decode=step: this adapter selects anew for each decoded token; the export has the prompt's selection"
        )
    if source.adapter.modules_to_save:
        names = ", ".join(source.adapter.modules_to_save)
        notes.append(
            f"{names}: trained whole and exported whole; servers that take low-rank weights alone refuse it"
        )
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)
