"""Load the model and run both passes, task by task; what is on the disk already is not computed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

from mixlora_cli.analysis.interference.files import NUMBER_FORMAT, RESULT, Stored, write_batches, write_layers
from mixlora_cli.analysis.interference.gradients import GradientTaker
from mixlora_cli.analysis.interference.groups import require_gradients
from mixlora_cli.analysis.interference.measured import (
    FILE_NAME,
    cover,
    measure_steps,
    read_steps,
    write_steps,
)
from mixlora_cli.analysis.interference.passes import mean_unit_gradient, products, stack_directions
from mixlora_cli.analysis.interference.plan import Plan
from mixlora_cli.analysis.interference.progress import Advance, batch_progress, timed
from mixlora_cli.analysis.interference.sample import encode_batches
from mixlora_cli.analysis.interference.scores import Measurement
from mixlora_cli.analysis.interference.store import TaskStore, fingerprint, task_stores
from mixlora_cli.data.collate import Collator, PixelLoader
from mixlora_cli.data.encode import Item
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.fingerprint import prompt_digest
from mixlora_cli.launch.team import Team
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.base import Base
from mixlora_cli.models.build import build_base
from mixlora_cli.models.features import FeatureCache, pictures_from
from mixlora_cli.models.task_routing import TaskRouting
from mixlora_cli.training.precision import choose_dtype
from mixlora_cli.training.run_folder import versions


@dataclass(frozen=True)
class _Work:
    """A loaded model, what is put to it, and where the results go."""

    plan: Plan
    taker: GradientTaker
    batches: Mapping[str, Sequence[Sequence[Item]]]
    stores: Mapping[str, TaskStore]
    team: Team
    console: Console

    def gradients(self, task: str, advance: Advance) -> Iterator[list[torch.Tensor]]:
        """One batch after the other."""
        for number, items in enumerate(self.batches[task]):
            yield self.taker.gradient(task, number, items)
            advance()


def measure(plan: Plan, team: Team, console: Console) -> Stored:
    """Both passes over all tasks, each process its share; the first one writes the Parquet files.

    Raises:
        UserError: a record cannot be encoded, or the steps that are asked for would drown in rounding.
    """
    config, request = plan.config, plan.request
    dtype = choose_dtype(request["precision"])
    if config.measure.lambdas is not None and dtype != torch.float32:
        raise UserError(
            "measure.lambdas: in bf16 rounding is larger than what a small step changes; "
            "add interference.precision=fp32"
        )
    with team.leader_first():
        base = build_base(plan.measured.subject.model, dtype)
    batches = {sample.task: encode_batches(sample, base, config) for sample in plan.samples}
    own = _dependencies(plan, base, dtype)
    taker = _gradient_taker(plan, base, dtype)
    work = _Work(plan, taker, batches, task_stores(plan.folder, own), team, console)
    _run_passes(work)
    _take_steps(work, fingerprint(own))
    team.wait()
    about = {
        "label": plan.measured.subject.label,
        "run": str(config.run),
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        NUMBER_FORMAT: str(dtype).removeprefix("torch."),
        "batch_size": config.interference.batch_size,
        "pictures": pictures_from(config.interference.cache_features),
        "request": dict(request),
        "versions": versions(),
    }
    return _collect(work, about)


def _dependencies(plan: Plan, base: Base, dtype: torch.dtype) -> dict[str, Any]:
    """For each task, all that its direction depends on; to be called before the adapter is attached."""
    shared = {
        **{key: value for key, value in plan.request.items() if key not in ("samples", "definitions")},
        "base": base.fingerprint,
        "prompt": prompt_digest(base),
        "dtype": str(dtype),
    }
    return {
        s.task: {**shared, "definition": _definition(plan.routing, base, s.task), "sample": s.digest}
        for s in plan.samples
    }


def _gradient_taker(plan: Plan, base: Base, dtype: torch.dtype) -> GradientTaker:
    """The adapter on its base, in eval mode.

    The cache of features changes the base, and definitions are read without an adapter: both come before it.
    """
    cached = plan.config.interference.cache_features
    features = FeatureCache(base) if cached else PixelLoader(base.image_processor)
    embeddings = None if plan.routing is None else plan.routing.embeddings(base)
    model = load_adapter(base.model, plan.measured.folder)
    assert isinstance(model, PeftModel)
    if torch.cuda.is_available():
        module: torch.nn.Module = model
        module.cuda()
    tokenizer = base.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = Collator(pad, features, embeddings=embeddings)
    return GradientTaker(model, require_gradients(model), collate, dtype, plan.config.seed)


def _definition(routing: TaskRouting | None, base: Base, task: str) -> str | None:
    """What a task's own routing depends on."""
    if routing is None:
        return None
    alone = TaskRouting({task: routing.definitions[task]}, routing.encoder, routing.width)
    return alone.fingerprint(base)


def _run_passes(work: _Work) -> None:
    mine = work.team.share(list(work.batches))
    first = [task for task in mine if not work.stores[task].has_direction()]
    second = [task for task in mine if not work.stores[task].has_products()]
    if len(first) < len(mine):
        work.console.print(
            f"continuing: of {len(mine)} tasks, the first pass over {len(mine) - len(first)} and the second over "
            f"{len(mine) - len(second)} are there already"
        )
    groups, console, folder = work.taker.factors.groups, work.console, work.plan.folder
    with batch_progress(console, sum(len(work.batches[task]) for task in first + second)) as advance:
        for task in first:
            with timed(folder, console, "first pass", task, len(work.batches[task])):
                work.stores[task].write_direction(groups, mean_unit_gradient(work.gradients(task, advance)))
        work.team.wait()
        if not second:
            return
        device = work.taker.model.device
        directions = stack_directions(
            [store.read_direction(groups, device) for store in work.stores.values()]
        )
        for task in second:
            with timed(folder, console, "second pass", task, len(work.batches[task])):
                found = products(work.gradients(task, advance), directions)
                work.stores[task].write_products(groups, found)


def _take_steps(work: _Work, digest: str) -> None:
    """Real steps, in the first process alone: they move the weights that all tasks share."""
    settings, folder = work.plan.config.measure, work.plan.folder
    if not work.team.leads:
        return
    available = min(len(batches) for batches in work.batches.values())
    taken = read_steps(folder, digest)
    if taken is None:
        (folder / FILE_NAME).unlink(missing_ok=True)  # of another measurement
    if settings.lambdas is None or cover(taken, settings, available):
        return
    matrices = len({group.matrix for group in work.taker.factors.groups})
    num_batches = min(settings.batches, available)
    total = matrices * num_batches * len(work.batches) * len(settings.lambdas)
    with batch_progress(work.console, total, "real steps") as advance:
        steps = measure_steps(work.taker, work.batches, settings.lambdas, num_batches, advance)
    write_steps(folder, digest, steps)


def _collect(work: _Work, about: dict[str, Any]) -> Stored:
    found = [store.read_products() for store in work.stores.values()]
    measurement = Measurement(tuple(work.stores), found[0][0], tuple(part for _, part in found))
    if work.team.leads:
        (work.plan.folder / RESULT).unlink(missing_ok=True)  # written last: what has it is complete
        for old in work.plan.folder.glob("compare_*"):
            old.unlink()
        write_batches(work.plan.folder, measurement)
        write_layers(work.plan.folder, measurement)
    return Stored(about, measurement)
