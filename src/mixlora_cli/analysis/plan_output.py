"""What `mixlora plan` prints and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mixlora_cli.analysis.gpu_memory import CONTEXT_BYTES, FRAGMENTATION, GIB, GPUS
from mixlora_cli.analysis.meta_picture import SIZE
from mixlora_cli.analysis.plan import SMALL_CARD, Plan, Schedule, Way, make_plan, total
from mixlora_cli.config import PlanConfig
from mixlora_cli.progress import say
from mixlora_cli.store import write_json
from mixlora_cli.tables import Table, show

FILE = "plan.json"
_NEEDED = ("weights", "gradients", "optimizer", "activations", "logits", "overhead", "total")


def plan(config: PlanConfig) -> Path:
    """Print the plan and write it to `<output_dir>/plan.json`, whose path is returned.

    Raises:
        UserError: the model's sizes are not known, the instances cannot be counted, the batch cannot be split.
    """
    made = make_plan(config)
    console = Console(soft_wrap=True)
    _show(made, console)
    file = Path(config.output_dir) / FILE
    write_json(file, as_dict(made))
    say(f"written: {file}", console)
    return file


def _show(plan: Plan, console: Console) -> None:
    machine, gpu = plan.config.plan, plan.gpu
    say(f"plan for {machine.gpus} x {gpu.label} ({gpu.memory_gib:g} GiB, {gpu.tflops:g} TFLOP/s)", console)
    show([_parameters(plan), _memory(plan), _cards(plan)], console)
    say(
        f"as configured (*), deepspeed={plan.stage}: {'fits' if plan.own.fits else 'does not fit'} on "
        f"{machine.gpus} x {gpu.label}. To take: {plan.advice}",
        console,
    )
    say(_small_card(plan), console)
    show(_time(plan), console)
    for line in [_disk(plan), *_notes(plan)]:
        say(line, console)


def _parameters(plan: Plan) -> Table:
    trained, frozen = total(plan.counts)
    rows = [(kind, f"{count['trained']:,}", f"{count['frozen']:,}") for kind, count in plan.counts.items()]
    rows.append(("all", f"{trained:,} ({100 * trained / (trained + frozen):.2f} %)", f"{frozen:,}"))
    return Table("parameters", ("", "trained", "frozen"), tuple(rows))


def _memory(plan: Plan) -> Table:
    train, fits = plan.config.train, list(plan.fits.values())
    pairs = [(fit.without_checkpointing, fit.with_checkpointing) for fit in fits]
    needs = [pair[train.gradient_checkpointing] for pair in pairs]
    others = [pair[not train.gradient_checkpointing] for pair in pairs]
    names = {"optimizer": "optimizer states", "logits": "logits and loss", "total": "all"}

    def row(label: str, sizes: Iterable[float]) -> tuple[str, ...]:
        return label, *(f"{size / GIB:.1f}" for size in sizes)

    rows = [
        *(row(names.get(name, name), (getattr(need, name) for need in needs)) for name in _NEEDED),
        ("fits", *("yes" if fit.fits else "no" for fit in fits)),
        ("largest batch that fits", *(str(fit.largest_batch) for fit in fits)),
        row(
            f"all, {'without' if train.gradient_checkpointing else 'with'} checkpointing",
            (need.total for need in others),
        ),
        row("main memory, all GPUs", (need.host for need in needs)),
    ]
    return Table(
        f"GiB on each GPU with {train.batch_size} instances of {plan.config.data.max_length} tokens",
        ("", *(stage + ("*" if stage == plan.stage else "") for stage in plan.fits)),
        tuple(rows),
    )


def _cards(plan: Plan) -> Table:
    """What one card alone can take."""
    own = plan.way
    ways = [
        Way(1, checkpointing, quantization)
        for quantization in plan.quantizations
        for checkpointing in (False, True)
    ]

    def title(way: Way) -> str:
        named: list[str] = [] if way.quantization == "none" else [way.quantization]
        named += ["checkpointing"] if way.checkpointing else []
        star = "*" if replace(way, batch_size=own.batch_size) == own else ""
        return (" + ".join(named) or "neither") + star

    return Table(
        f"largest batch of {plan.config.data.max_length} tokens on one card alone",
        ("", *map(title, ways)),
        tuple(
            (gpu.label, *(str(plan.largest_batch(way, gpu)) for way in ways))
            for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory_gib)
        ),
    )


def _small_card(plan: Plan) -> str:
    need, way = plan.small_card
    size = f"{need.total / GIB:.1f} of {GPUS[SMALL_CARD].memory_gib:g} GiB"
    if way == plan.way:
        return f"fits one 24 GB card: yes ({size})"
    if way is None:
        return f"fits one 24 GB card: no ({size}), and nothing helps but a smaller model or data.max_length"
    changed = way.overrides(plan.way, plan.config.train.accumulation)
    return f"fits one 24 GB card: no ({size}); yes with {changed} ({plan.need(way, 'none', 1).total / GIB:.1f} GiB)"


def _time(plan: Plan) -> Table:
    schedules = [plan.schedule] + ([] if plan.published is None else [plan.published])
    formats: dict[str, Callable[[Schedule], str]] = {
        "steps": lambda one: f"{one.steps:,}",
        "batch x accumulation x GPUs": lambda one: (
            f"{one.batch_size} x {one.accumulation} x {plan.config.plan.gpus}"
        ),
        "tokens a step": lambda one: f"{one.tokens_per_step:,.0f}",
        "  forward": lambda one: f"{one.forward / 1e15:.2f}",
        "  backward": lambda one: f"{one.backward / 1e15:.2f}",
        "  recomputation": lambda one: f"{one.recomputation / 1e15:.2f}",
        "  vision": lambda one: f"{one.vision / 1e15:.2f}",
        "PFLOP a step": lambda one: f"{one.operations_per_step / 1e15:.2f}",
        "hours": lambda one: f"{one.hours:.1f}",
    }
    rows = [(label, *map(text, schedules)) for label, text in formats.items()]
    labels = ("this program", "published code")[: len(schedules)]
    return Table(f"operations and time at an MFU of {plan.config.plan.mfu:g}", ("", *labels), tuple(rows))


def _disk(plan: Plan) -> str:
    names = {
        "checkpoints": f"{plan.config.train.keep_checkpoints} checkpoints and one being written",
        "features": "picture features",
    }
    sizes = {names.get(name, name): size / 1e9 for name, size in plan.disk.items() if size}
    listed = ", ".join(f"{name} {size:.1f}" for name, size in sizes.items())
    return f"disk without the data: {sum(sizes.values()):.1f} GB ({listed})"


def _notes(plan: Plan) -> list[str]:
    work = plan.work
    notes = [
        f"{work.instances:,} instances ({work.instances_from}) of {work.tokens:g} tokens, {work.padding:.0%} padding, "
        f"{work.label_tokens:g} tokens with loss; assumed, not measured: {', '.join(work.assumed)}, the MFU",
        f"MFU: operations really done, recomputed ones too, as a share of {plan.gpu.tflops:g} TFLOP/s; frozen weights "
        "have no gradient and are not counted there",
        f"overhead: {CONTEXT_BYTES / GIB:g} GiB of context and libraries, DeepSpeed's buckets, "
        f"{FRAGMENTATION:.0%} of activations; activations are those of the longest batch",
    ]
    seen = plan.measured.picture
    if plan.measured.unseen is not None:
        notes.append(
            f"without the vision side, which cannot be measured ({plan.measured.unseen}): give plan.tokens; it takes "
            "more hours than this"
        )
    elif seen is not None:
        notes.append(
            f"a picture takes {seen.tokens:,} tokens, and {seen.operations.forward / 1e12:.2f} TFLOP forward; one of "
            f"{SIZE[0]} x {SIZE[1]} pixels where its size has a say"
        )
        if seen.tokens >= plan.config.data.max_length:
            notes.append(
                f"data.max_length={plan.config.data.max_length} is shorter than such a picture: give a larger one, or "
                "smaller pictures"
            )
    if plan.published is not None:
        notes.append(
            "published code: forms the matrix BA of every instance and multiplies every token with it; this program "
            "never forms it"
        )
    if plan.config.plan.gpus > 1:
        notes.append("communication is not timed apart: it is part of what keeps the MFU below 1")
    return notes


def as_dict(plan: Plan) -> dict[str, Any]:
    """The content of `plan.json`: bytes, operations and hours as numbers."""
    machine, work = plan.config.plan, plan.work
    return {
        "gpu": {
            "name": machine.gpu,
            "number": machine.gpus,
            "memory_bytes": plan.gpu.memory_bytes,
            "tflops": plan.gpu.tflops,
        },
        "parameters": plan.counts,
        "workload": {**asdict(work), "assumed": [*work.assumed, "mfu"]},
        "stage": plan.stage,
        "fits": plan.own.fits,
        "advice": plan.advice,
        "memory": {
            stage: {
                "fits": fit.fits,
                "largest_batch": fit.largest_batch,
                "host_bytes": fit.with_checkpointing.host,
                "with_checkpointing": {name: getattr(fit.with_checkpointing, name) for name in _NEEDED},
                "without_checkpointing": {name: getattr(fit.without_checkpointing, name) for name in _NEEDED},
            }
            for stage, fit in plan.fits.items()
        },
        "one_24gb_card": _small_card_as_dict(plan),
        "disk": plan.disk,
        "mfu": machine.mfu,
        "time": asdict(plan.schedule),
        "time_published_code": None if plan.published is None else asdict(plan.published),
    }


def _small_card_as_dict(plan: Plan) -> dict[str, Any]:
    need, way = plan.small_card
    fitting = None if way is None else {**asdict(way), "bytes": plan.need(way, "none", 1).total}
    return {"fits": way == plan.way, "bytes": need.total, "first_way_that_fits": fitting}
