"""`mixlora interference`: gradients of every task in, scores, figures and a comparison out."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console

from mixlora_cli.analysis.interference import files, scores
from mixlora_cli.analysis.interference.figures import choose_layers, draw_all
from mixlora_cli.analysis.interference.files import NUMBER_FORMAT, Stored, TaskFiles, check_comparable
from mixlora_cli.analysis.interference.gradients import (
    GradientTaker,
    Step,
    mean_unit_gradient,
    measure_steps,
    products,
    require_gradients,
    stack_directions,
    summarise_steps,
)
from mixlora_cli.config import InterferenceConfig, MeasureConfig
from mixlora_cli.data.encode import Item, encode_records
from mixlora_cli.data.loading import load_records, locate_files
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.fingerprint import prompt_digest, records_digest
from mixlora_cli.evaluation.instances import grouped
from mixlora_cli.launch import ProcessGroup, joined
from mixlora_cli.method.config import PEFT_TYPE
from mixlora_cli.models import forward
from mixlora_cli.models.definitions import TaskRouting
from mixlora_cli.models.features import FeatureCache, pictures_from
from mixlora_cli.models.load import LoadedModel, build_base
from mixlora_cli.models.session import Run, Session, find_run
from mixlora_cli.output import alone_in
from mixlora_cli.progress import Advance, counting, say
from mixlora_cli.store import digest_of, write_text
from mixlora_cli.tables import Table, show
from mixlora_cli.training.run_folder import versions

_PATIENCE = timedelta(days=2)
"""Processes wait for one another's tasks, which may take hours."""
_IN_WORDS = {
    "samples": "tasks, instances or batches",
    "definitions": "task definitions",
    NUMBER_FORMAT: "precision",
}
"""Of what a measurement depends on, where its key does not say it."""


@dataclass(frozen=True)
class Sample:
    """One task's instances in the order in which they are put into batches."""

    task: str
    records: tuple[Record, ...]
    digest: str
    """Changes with an instance, with their order and with the size of a batch."""


def interference(config: InterferenceConfig) -> Path:
    """Measure, or take what was measured before with the same settings; write, draw and print it.

    Returns:
        The output folder.

    Raises:
        UserError: there is no adapter, task or instance to measure, or the output folder holds another measurement.
            Found before a model is loaded.
    """
    folder = Path(config.output_dir).expanduser()
    with alone_in(folder, "measurement"), joined(_PATIENCE) as team:
        console = Console(stderr=True, quiet=not team.is_main, soft_wrap=True)
        stored = files.read_stored(folder)
        if not config.draw_only:
            stored = _measured(config, folder, stored, team, console)
        elif stored is None:
            raise UserError(
                f"draw_only=true: nothing was measured in {folder}; give its output_dir=, or draw_only=false to "
                "measure"
            )
        if team.is_main:
            _report(config, folder, stored, console)
    return folder


def _measured(
    config: InterferenceConfig, folder: Path, stored: Stored | None, team: ProcessGroup, console: Console
) -> Stored:
    """What the folder holds, if it is what is asked for; else a new measurement, kept there."""
    run = _find(config)
    with team.main_process_first():
        samples = draw_samples(config)
    routing = run.task_routing(config.data, [sample.task for sample in samples])
    request = _request(config, run, samples, routing)
    here = forward.number_format(request["precision"])
    if config.compare is not None:
        check_comparable(config.compare, files.open_other(config.compare), dict(request["samples"]), here)
    if stored is not None:
        asked = {**request, NUMBER_FORMAT: here}
        before = {**stored.about["request"], NUMBER_FORMAT: stored.about[NUMBER_FORMAT]}
        available = min(len(products.norms) for products in stored.measurement.products)
        if before != asked and not config.overwrite:
            changed = [_IN_WORDS.get(key, key) for key in asked if before.get(key) != asked[key]]
            raise UserError(
                f"output_dir={folder} holds a measurement with other {', '.join(changed) or 'settings'}; give another "
                "output_dir=, or overwrite=true to replace it"
            )
        if before == asked and (
            config.measure.lambdas is None or _cover(files.read_steps(folder), config.measure, available)
        ):
            say("measured before with these settings: drawing from the stored scores", console)
            return stored
    _say_what_to_know(config, run, here, console)
    return _measure(config, folder, run, samples, routing, request, team, console)


def _find(config: InterferenceConfig) -> Run:
    """The finished LoRA or MixLoRA adapter; UserError where there is none."""
    run = find_run(config.run, config.model)
    kind = run.settings.get("peft_type")
    if not run.settings:
        raise UserError(
            f"run={config.run} trained the model's own weights and has no low-rank adapter; expected a run of "
            "adapter=lora or adapter=mixlora"
        )
    if kind not in ("LORA", PEFT_TYPE):
        raise UserError(
            f"run={config.run} holds an adapter of kind {kind}; expected LORA or {PEFT_TYPE.value}"
        )
    return run


def draw_samples(config: InterferenceConfig) -> list[Sample]:
    """At most `batches` whole batches of each task, in the order of `tasks`. No model is needed.

    Raises:
        UserError: an unknown task, only one, or a task that has not enough instances for two batches.
    """
    settings = config.interference
    if settings.split == "heldout" and config.data.source == "json" and config.data.heldout is None:
        raise UserError(
            "interference.split=heldout needs held-out records: give data.heldout=<file>, or interference.split=train"
        )
    by_task = grouped(_load(config), lambda record: record.task)
    tasks = list(by_task) if config.tasks is None else list(dict.fromkeys(config.tasks))
    if len(tasks) < 2:
        raise UserError(
            f"tasks=[{','.join(map(cut, tasks))}]: the {settings.split} data has no other task, and one "
            "cannot disturb itself; expected at least two"
        )
    images = locate_files(config.data, settings.split).pictures
    samples = []
    for task in tasks:
        records = by_task.get(task, [])
        num_batches = min(len(records) // settings.batch_size, settings.batches)
        if num_batches < 2:
            raise UserError(
                f"tasks: {cut(task)} has {len(records)} instances in the {settings.split} data, too few for "
                f"two batches of interference.batch_size={settings.batch_size}: leave the task out, or lower "
                "the batch size"
            )
        # A generator of its own: other tasks change nothing. Hashed by the generator, so alike in every process.
        order = random.Random(f"interference/{config.seed}/{task}").sample(
            records, num_batches * settings.batch_size
        )
        digest = hashlib.sha256(f"{records_digest(order, images)}/{settings.batch_size}".encode())
        samples.append(Sample(task, tuple(order), digest.hexdigest()[:16]))
    return samples


def _load(config: InterferenceConfig) -> list[Record]:
    """Checked records of the wanted tasks; the pictures of other tasks are not opened."""
    data = config.data
    tasks = data.tasks if config.tasks is None else list(dict.fromkeys(config.tasks))
    try:
        return load_records(replace(data, tasks=tasks), config.interference.split, config.seed)
    except UserError as error:
        if config.tasks is not None:
            raise UserError(str(error).replace("data.tasks=", "tasks=", 1)) from None
        raise


def _request(
    config: InterferenceConfig, run: Run, samples: Sequence[Sample], routing: TaskRouting | None
) -> dict[str, Any]:
    """All that the gradients depend on, as far as it is known without the model. Plain values, as JSON gives them."""
    settings = config.interference
    return {
        "adapter": run.digest,
        "model": asdict(run.model),
        "precision": run.precision if settings.precision == "run" else settings.precision,
        "split": settings.split,
        "cache_features": settings.cache_features,
        "max_length": config.data.max_length,
        "seed": config.seed,
        "definitions": None if routing is None else dict(sorted(routing.definitions.items())),
        "samples": [[sample.task, sample.digest] for sample in samples],
    }


def _cover(steps: Sequence[Step] | None, wanted: MeasureConfig, available: int) -> bool:
    """Whether these steps are the wanted ones, of at least as many batches; `available`: how many a task has."""
    if not steps or {step.length for step in steps} != set(wanted.lambdas or ()):
        return False
    return 1 + max(step.batch for step in steps) >= min(wanted.batches, available)


def _say_what_to_know(config: InterferenceConfig, run: Run, dtype: str, console: Console) -> None:
    notes = {
        f"this run was trained on data={run.data and run.data.source}, its gradients are taken on {config.data.name}": (
            run.data is not None and run.data.source != config.data.source
        ),
        f"routing=random: each batch draws its factors with seed={config.seed}, alike in both passes": (
            run.selects_by == "chance"
        ),
        "pictures are features of the frozen tower, kept in fp16, as a training with train.cache_features=true reads "
        "them, too; interference.cache_features=false takes them from the pixels in fp32": (
            config.interference.cache_features and dtype == "float32"
        ),
    }
    for note, holds in notes.items():
        if holds:
            say(f"note: {note}", console)


def _measure(
    config: InterferenceConfig,
    folder: Path,
    run: Run,
    samples: Sequence[Sample],
    routing: TaskRouting | None,
    request: Mapping[str, Any],
    team: ProcessGroup,
    console: Console,
) -> Stored:
    """Both passes over all tasks, each process its share; the first one takes steps and writes the Parquet files.

    Raises:
        UserError: a record cannot be encoded, or the steps that are asked for would drown in rounding.
    """
    settings = config.interference
    dtype = forward.choose_dtype(request["precision"])
    if config.measure.lambdas is not None and dtype != torch.float32:
        raise UserError(
            "measure.lambdas: in bf16 rounding is larger than what a small step changes; "
            "add interference.precision=fp32"
        )
    with team.main_process_first():
        base = build_base(run.model, dtype)
    batches = {sample.task: _encode(sample, base, config) for sample in samples}
    own = _dependencies(request, samples, routing, base, dtype)  # before the adapter is on
    session = Session(base, dtype, settings.cache_features, run.adapter, routing)
    assert isinstance(session.model, PeftModel)
    taker = GradientTaker(session, require_gradients(session.model), config.seed)
    of_tasks = files.task_files(folder, own)
    _run_passes(taker, batches, of_tasks, folder, team, console)
    if team.is_main:  # alone: steps move the weights that all tasks share
        _take_steps(taker, batches, config.measure, folder, digest_of(own), console)
    team.wait()
    found = [each.read_products() for each in of_tasks.values()]
    measurement = scores.Measurement(tuple(of_tasks), found[0][0], tuple(part for _, part in found))
    if team.is_main:
        files.write_tables(folder, measurement)
    about = {
        "label": run.label,
        "run": str(config.run),
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        NUMBER_FORMAT: str(dtype).removeprefix("torch."),
        "batch_size": settings.batch_size,
        "pictures": pictures_from(isinstance(session.features, FeatureCache)),
        "request": dict(request),
        "versions": versions(),
    }
    return Stored(about, measurement)


def _encode(sample: Sample, base: LoadedModel, config: InterferenceConfig) -> list[list[Item]]:
    """Batches of one task as training reads them, in the order of the sample."""
    data, size = config.data, config.interference.batch_size
    source = f"the {config.interference.split} data of {sample.task}"
    items = encode_records(sample.records, base.chat, data.max_length, data.on_error, source).items
    if len(items) < 2 * size:
        raise UserError(
            f"tasks: {sample.task} has {len(items)} instances that can be encoded, too few for two batches of "
            f"interference.batch_size={size}: leave the task out, or lower the batch size"
        )
    return [list(items[start : start + size]) for start in range(0, len(items) - size + 1, size)]


def _dependencies(
    request: Mapping[str, Any],
    samples: Sequence[Sample],
    routing: TaskRouting | None,
    base: LoadedModel,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """For each task, all that its direction depends on."""
    shared = {
        **{key: value for key, value in request.items() if key not in ("samples", "definitions")},
        "base": base.fingerprint,
        "prompt": prompt_digest(base),
        "dtype": str(dtype),
    }

    def definition(task: str) -> str | None:
        if routing is None:
            return None
        return replace(routing, definitions={task: routing.definitions[task]}).fingerprint(base)

    return {s.task: {**shared, "definition": definition(s.task), "sample": s.digest} for s in samples}


def _run_passes(
    taker: GradientTaker,
    batches: Mapping[str, Sequence[Sequence[Item]]],
    of_tasks: Mapping[str, TaskFiles],
    folder: Path,
    team: ProcessGroup,
    console: Console,
) -> None:
    """Both passes over this process's tasks; what is on the disk already is not computed again."""
    mine = team.share(list(batches))
    first = [task for task in mine if not of_tasks[task].has_direction()]
    second = [task for task in mine if not of_tasks[task].has_products()]
    if len(first) < len(mine):
        say(
            f"continuing: of {len(mine)} tasks, the first pass over {len(mine) - len(first)} and the second over "
            f"{len(mine) - len(second)} are there already",
            console,
        )
    groups = tuple(taker.factors)

    def gradients(task: str, advance: Advance) -> Iterator[list[torch.Tensor]]:
        for number, items in enumerate(batches[task]):
            yield taker.gradient(task, number, items)
            advance()

    with counting("gradients", sum(len(batches[task]) for task in first + second), console=console) as done:
        for task in first:
            with _timed(folder, console, "first pass", task, len(batches[task])):
                of_tasks[task].write_direction(groups, mean_unit_gradient(gradients(task, done)))
        team.wait()
        if not second:
            return
        device = taker.session.device
        directions = stack_directions([each.read_direction(groups, device) for each in of_tasks.values()])
        for task in second:
            with _timed(folder, console, "second pass", task, len(batches[task])):
                of_tasks[task].write_products(groups, products(gradients(task, done), directions))


@contextmanager
def _timed(folder: Path, console: Console, name: str, task: str, batches: int) -> Iterator[None]:
    """Note what a task took in `timing.jsonl` of `folder`, and say it."""
    start = time.monotonic()
    yield
    seconds = time.monotonic() - start
    row = {"pass": name, "task": task, "batches": batches, "seconds": round(seconds, 3)}
    row["peak_bytes"] = _peak_memory()
    with (folder / "timing.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    say(f"{name}: {cut(task)}, {batches} batches in {seconds:.1f} s", console)


def _peak_memory() -> int:
    """Most bytes that were in use so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * scale


def _take_steps(
    taker: GradientTaker,
    batches: Mapping[str, Sequence[Sequence[Item]]],
    settings: MeasureConfig,
    folder: Path,
    fingerprint: str,
    console: Console,
) -> None:
    available = min(map(len, batches.values()))
    taken = files.read_steps(folder, fingerprint)
    if taken is None:
        (folder / files.STEPS).unlink(missing_ok=True)  # of another measurement
    if settings.lambdas is None or _cover(taken, settings, available):
        return
    matrices = len({group.matrix for group in taker.factors})
    num_batches = min(settings.batches, available)
    total = matrices * num_batches * len(batches) * len(settings.lambdas)
    with counting("real steps", total, console=console) as advance:
        steps = measure_steps(taker, batches, settings.lambdas, num_batches, advance)
    files.write_steps(folder, fingerprint, steps)


def _report(config: InterferenceConfig, folder: Path, stored: Stored, console: Console) -> None:
    """Write everything that follows from the stored products; they come first, `interference.json` last."""
    other = None if config.compare is None else files.open_other(config.compare)
    if other is not None:
        check_comparable(str(config.compare), other, stored.samples, stored.about[NUMBER_FORMAT])
    choose_layers(stored.measurement, config.draw.layers)
    average = scores.averages(stored.measurement)
    content = scores.summarise(stored.measurement, average, config.interference.near_zero)
    steps = files.read_steps(folder)
    if steps is not None:
        content["measured"] = summarise_steps(steps)
    if other is not None:
        compared = scores.compare_scores(average, scores.averages(other.measurement))
        content["compare"] = {"with": other.label, "folder": config.compare, "scores": compared}
    content = {"format": files.FORMAT, "about": stored.about, **content}
    write_text(folder / files.RESULT, json.dumps(content, indent=1) + "\n")
    draw_all([stored], folder, config.draw)
    _print_result(console, stored.label, content, average, config.draw.score)
    if other is not None:
        draw_all([other, stored], folder, config.draw)
        _print_comparison(console, stored.label, other.label, compared)
    say(f"scores and figures are in {folder}", console)


def _print_result(
    console: Console,
    label: str,
    content: Mapping[str, Any],
    average: Mapping[str, Mapping[str, scores.Scores]],
    variant: str,
) -> None:
    """Averages over all layers, negative interference with its interval, and warnings about denominators."""
    tasks = [cut(task) for task in content["tasks"]]
    for matrix, by_variant in average.items():
        title = f"{label}, {matrix}: effect of task j (column) on task i (row), {variant}"
        values = [[f"{x:.2f}" if np.isfinite(x) else "?" for x in row] for row in by_variant[variant].value]
        rows = tuple((task, *row) for task, row in zip(tasks, values, strict=True))
        show(Table(title, ("", *tasks), rows), console)
    for matrix, negative in content["negative"].items():
        for name, found in negative.items():
            text = _text(found["value"])
            if found.get("low") is not None:
                text += f" (95 % over batches: {_text(found['low'])} to {_text(found['high'])})"
            text += f", {found['negative_pairs']} of {found['pairs']} pairs below zero"
            say(f"negative interference, {matrix}, {name}: {text}", console)
    for matrix, found in content["denominators"].items():
        kinds = ("total", "undefined", "near_zero", "negative")
        counts = {kind: sum(row[kind] for row in found["tasks"]) for kind in kinds}
        say(
            f"denominators, {matrix}: of {counts['total']}, {counts['undefined']} are zero (left out), "
            f"{counts['near_zero']} near zero (cosine below {found['near_zero']:g}, kept), "
            f"{counts['negative']} negative (kept)",
            console,
        )
    for row in content.get("measured", ()):
        all_steps, same = (
            "?" if row[key] is None else f"{row[key]:.1%}"
            for key in ("relative_error", "relative_error_same_factors")
        )
        say(
            f"real steps, {row['matrix']}, lambda={row['lambda']:g}: the estimate is off by {all_steps}; by {same} "
            f"without the {row['rerouted']} of {row['steps']} losses that other factors were selected for",
            console,
        )


def _print_comparison(
    console: Console, label: str, other: str, compared: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> None:
    """How much negative interference has gone, for each matrix and variant."""
    for matrix, by_variant in compared.items():
        for variant, row in by_variant.items():
            removed, ends = row["removed"], row.get("removed_over_batches")
            if removed is None:
                change = "there was none to remove"
            else:
                change = f"{removed:.0%} of it removed" if removed >= 0 else f"{-removed:.0%} more of it"
                if ends is not None:
                    change += f" (removed, 95 % over batches: {ends[0]:.0%} to {ends[1]:.0%})"
            before, after = f"{other} {_text(row['before'])}", f"{label} {_text(row['after'])}"
            say(f"negative interference, {matrix}, {variant}: {before}, {after}: {change}", console)


def _text(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"
