"""A plan as tables for people and as plain values for `plan.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mixlora_cli.analysis.planning.counts import num_frozen, num_trained
from mixlora_cli.analysis.planning.fit import Fit
from mixlora_cli.analysis.planning.hardware import GIB
from mixlora_cli.analysis.planning.memory import CONTEXT_BYTES, FRAGMENTATION, Need
from mixlora_cli.analysis.planning.run import Plan
from mixlora_cli.analysis.planning.schedule import Schedule


def show(plan: Plan, console: Console) -> None:
    """Print everything."""
    machine = plan.config.plan
    _say(
        console,
        f"plan for {machine.gpus} x {plan.gpu.label} ({plan.gpu.memory_gib:g} GiB, {plan.gpu.tflops:g} TFLOP/s)",
    )
    console.print(_parameters(plan))
    console.print(_memory(plan))
    _say(console, _verdict(plan))
    console.print(_time(plan))
    _say(console, _disk(plan))
    for line in _notes(plan):
        _say(console, line)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _parameters(plan: Plan) -> Table:
    table = _table("parameters", "", "trained", "frozen")
    for count in plan.counts:
        table.add_row(count.kind, f"{count.trained:,}", f"{count.frozen:,}")
    trained, frozen = num_trained(plan.counts), num_frozen(plan.counts)
    table.add_row("all", f"{trained:,} ({100 * trained / (trained + frozen):.2f} %)", f"{frozen:,}")
    return table


def _memory(plan: Plan) -> Table:
    train = plan.config.train
    needs = [
        fit.with_checkpointing if train.gradient_checkpointing else fit.without_checkpointing
        for fit in plan.fits
    ]
    table = _table(
        f"GiB on each GPU with {train.batch_size} instances of {plan.config.data.max_length} tokens",
        "",
        *(fit.stage + ("*" if fit.stage == plan.stage else "") for fit in plan.fits),
    )
    _gib_row(table, "weights", (need.state.weights for need in needs))
    _gib_row(table, "gradients", (need.state.gradients for need in needs))
    _gib_row(table, "optimizer states", (need.state.optimizer for need in needs))
    _gib_row(table, "activations", (_layers(need) for need in needs))
    _gib_row(table, "logits and loss", (need.activations.logits for need in needs))
    _gib_row(table, "overhead", (need.overhead for need in needs))
    _gib_row(table, "all", (need.total for need in needs))
    table.add_row("fits", *("yes" if fit.fits else "no" for fit in plan.fits))
    table.add_row("largest batch that fits", *(str(fit.largest_batch) for fit in plan.fits))
    other = "without" if train.gradient_checkpointing else "with"
    _gib_row(
        table,
        f"all, {other} checkpointing",
        (getattr(fit, f"{other}_checkpointing").total for fit in plan.fits),
    )
    _gib_row(table, "main memory, all GPUs", (need.state.host for need in needs))
    return table


def _gib_row(table: Table, label: str, sizes: Iterable[float]) -> None:
    table.add_row(label, *(f"{size / GIB:.1f}" for size in sizes))


def _layers(need: Need) -> float:
    return need.activations.kept + need.activations.working


def _verdict(plan: Plan) -> str:
    machine = plan.config.plan
    fits = "fits" if plan.own.fits else "does not fit"
    return (
        f"as configured (*), deepspeed={plan.stage}: {fits} on {machine.gpus} x {plan.gpu.label}. "
        f"To take: {plan.advice}"
    )


def _time(plan: Plan) -> Table:
    schedules = [plan.schedule] + ([] if plan.published is None else [plan.published])
    labels = ("this program", "published code")[: len(schedules)]
    table = _table(f"operations and time at an MFU of {plan.config.plan.mfu:g}", "", *labels)
    table.add_row("steps", *(f"{each.steps:,}" for each in schedules))
    table.add_row(
        "batch x accumulation x GPUs",
        *(f"{each.batch_size} x {each.accumulation} x {each.world_size}" for each in schedules),
    )
    table.add_row("tokens a step", *(f"{each.tokens_per_step:,.0f}" for each in schedules))
    for part in ("forward", "backward", "recomputation", "vision", "total"):
        label = "PFLOP a step" if part == "total" else f"  {part}"
        table.add_row(label, *(f"{getattr(each.operations, part) / 1e15:.2f}" for each in schedules))
    table.add_row("hours", *(f"{each.hours:.1f}" for each in schedules))
    return table


def _disk(plan: Plan) -> str:
    held = plan.disk
    parts = {
        "base": held.base,
        "adapter": held.adapter,
        f"{plan.config.train.keep_checkpoints} checkpoints and one being written": held.checkpoints,
        "picture features": held.features,
    }
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)
    return f"disk without the data: {held.total / 1e9:.1f} GB ({listed})"


def _notes(plan: Plan) -> list[str]:
    work, machine = plan.work, plan.config.plan
    notes = [
        f"{work.instances:,} instances ({plan.instances_from}) of {work.tokens:g} tokens, {work.padding:.0%} padding, "
        f"{work.label_tokens:g} tokens with loss; assumed, not measured: {', '.join(work.assumed)}, the MFU",
        f"MFU: operations really done, recomputed ones too, as a share of {plan.gpu.tflops:g} TFLOP/s; frozen weights "
        "have no gradient and are not counted there",
        f"overhead: {CONTEXT_BYTES / GIB:g} GiB of context and libraries, DeepSpeed's buckets, "
        f"{FRAGMENTATION:.0%} of activations; activations are those of the longest batch",
    ]
    if plan.published is not None:
        notes.append(
            "published code: forms the matrix BA of every instance and multiplies every token with it; this program "
            "never forms it"
        )
    if machine.gpus > 1:
        notes.append("communication is not timed apart: it is part of what keeps the MFU below 1")
    return notes


def as_dict(plan: Plan) -> dict[str, Any]:
    """Plain values; bytes, operations and hours as numbers."""
    machine, work = plan.config.plan, plan.work
    return {
        "gpu": {
            "name": machine.gpu,
            "number": machine.gpus,
            "memory_bytes": plan.gpu.memory_bytes,
            "tflops": plan.gpu.tflops,
        },
        "parameters": {
            count.kind: {"trained": count.trained, "frozen": count.frozen} for count in plan.counts
        },
        "workload": {
            "instances": work.instances,
            "instances_from": plan.instances_from,
            "tokens": work.tokens,
            "padding": work.padding,
            "label_tokens": work.label_tokens,
            "assumed": [*work.assumed, "mfu"],
        },
        "stage": plan.stage,
        "fits": plan.own.fits,
        "advice": plan.advice,
        "memory": {fit.stage: _fit_dict(fit) for fit in plan.fits},
        "disk": asdict(plan.disk),
        "mfu": machine.mfu,
        "time": _schedule_dict(plan.schedule),
        "time_published_code": None if plan.published is None else _schedule_dict(plan.published),
    }


def _fit_dict(fit: Fit) -> dict[str, Any]:
    return {
        "fits": fit.fits,
        "largest_batch": fit.largest_batch,
        "host_bytes": fit.with_checkpointing.state.host,
        "with_checkpointing": _need_dict(fit.with_checkpointing),
        "without_checkpointing": _need_dict(fit.without_checkpointing),
    }


def _need_dict(need: Need) -> dict[str, float]:
    return {
        "weights": need.state.weights,
        "gradients": need.state.gradients,
        "optimizer": need.state.optimizer,
        "activations": _layers(need),
        "logits": need.activations.logits,
        "overhead": need.overhead,
        "total": need.total,
    }


def _schedule_dict(schedule: Schedule) -> dict[str, float]:
    done = schedule.operations
    return {
        "steps": schedule.steps,
        "batch_size": schedule.batch_size,
        "accumulation": schedule.accumulation,
        "tokens_per_step": schedule.tokens_per_step,
        "forward": done.forward,
        "backward": done.backward,
        "recomputation": done.recomputation,
        "vision": done.vision,
        "operations_per_step": done.total,
        "hours": schedule.hours,
    }
