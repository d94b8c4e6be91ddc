"""`mixlora plan`: a training's configuration in, a table and plan.json out; no weight and no picture is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from mixlora_cli.analysis.gpu_memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    GPUS,
    STAGES,
    Gpu,
    Need,
    Trained,
    need,
)
from mixlora_cli.analysis.meta_step import MetaStep
from mixlora_cli.config import DataConfig, PlanConfig
from mixlora_cli.data.loading import locate_files, prepared_root, read_manifest
from mixlora_cli.data.mini.plan import Counts as MiniCounts
from mixlora_cli.data.mini.seen import SEEN_TASKS
from mixlora_cli.data.problems import BadRecord
from mixlora_cli.data.records import task_of
from mixlora_cli.data.sources import read_raws
from mixlora_cli.errors import UserError
from mixlora_cli.models.forward import choose_dtype
from mixlora_cli.models.networks import STRIDE
from mixlora_cli.models.skeleton import attach_to_skeleton, build_skeleton
from mixlora_cli.progress import say
from mixlora_cli.store import write_json
from mixlora_cli.tables import Table, show
from mixlora_cli.training.arguments import accumulation

FILE = "plan.json"
PUBLISHED_INSTANCES = 191_105
"""Vision-Flan with up to 1,000 instances a task (Shen et al., section 5.1)."""
TEXT_TOKENS = 144
"""Tokens of an instance of Vision-Flan that are not its picture's, an estimate: instruction and options 90, answer 12,
template 42. See docs/paper-scale.md."""
PADDING_GROUPED, PADDING_RANDOM = 0.02, 0.2
"""Share of padding in batches of similar length, and in batches drawn at random; estimates."""
_MOST = 4096
"""Batches larger than this are not looked for."""
_ADDED = ("factors", "routers")
_NEEDED = ("weights", "gradients", "optimizer", "activations", "logits", "overhead", "total")
# The first part that a parameter's name contains decides; what contains none belongs to the language model.
_KINDS = {
    "mixlora_factors": "factors",
    "lora_A": "factors",
    "lora_B": "factors",
    "mixlora_router": "routers",
    "multi_modal_projector": "projector",
    "vision_tower": "vision tower",
    "": "language model",
}


Counts = dict[str, dict[Literal["trained", "frozen"], int]]
"""Parameters by kind."""


@dataclass(frozen=True)
class Workload:
    """What a training's data looks like to the GPUs."""

    instances: int
    instances_from: str
    tokens: float
    """Mean of an instance, image tokens included, padding not."""
    padding: float
    label_tokens: float
    assumed: tuple[str, ...]
    """Which of these are estimates, in words."""


@dataclass(frozen=True)
class Schedule:
    """Steps and what they cost over all GPUs."""

    steps: int
    batch_size: int
    accumulation: int
    tokens_per_step: float
    """Padding included."""
    forward: float
    """Operations of one step, as the next three."""
    backward: float
    recomputation: float
    vision: float
    operations_per_step: float
    hours: float


@dataclass(frozen=True)
class Fit:
    """One ZeRO stage on the chosen GPUs; a batch is taken to be as long as the configuration allows."""

    fits: bool
    """As configured."""
    largest_batch: int
    """Instances per GPU and forward pass that fit, with checkpointing as configured; 0 = not even one."""
    with_checkpointing: Need
    without_checkpointing: Need


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


def make_plan(config: PlanConfig) -> Plan:
    """Read the configuration; what is not asked for is not worked out. See `plan` for errors."""
    made = Plan(config, GPUS[config.plan.gpu])
    _ = made.work, made.schedule  # the errors
    return made


@dataclass(frozen=True)
class Plan:
    """A training's needs, each worked out when it is first asked for."""

    config: PlanConfig
    gpu: Gpu

    @cached_property
    def measured(self) -> MetaStep:
        return MetaStep(build_skeleton(self.config.model), self.config)

    @cached_property
    def counts(self) -> Counts:
        config, skeleton = self.config, build_skeleton(self.config.model)
        projector = config.model.train_projector
        return count_parameters(
            attach_to_skeleton(
                skeleton, config.adapter, config.routing, config.rank, config.factors, projector
            )
        )

    @cached_property
    def work(self) -> Workload:
        """The configured numbers, and estimates where they are null."""
        machine = self.config.plan
        instances, origin = (
            num_instances(self.config.data) if machine.instances is None else (machine.instances, "given")
        )
        assumed = ["label tokens"]
        tokens, padding = machine.tokens, machine.padding
        if tokens is None:
            tokens = float(self.measured.skeleton.config.image_seq_length + TEXT_TOKENS)
            assumed.append("tokens of an instance")
        if padding is None:
            padding = PADDING_GROUPED if self.config.train.group_by_length else PADDING_RANDOM
            assumed.append("padding")
        return Workload(instances, origin, tokens, padding, machine.label_tokens, tuple(assumed))

    @cached_property
    def schedule(self) -> Schedule:
        return self._schedule(published=False)

    @cached_property
    def published(self) -> Schedule | None:
        """The same training as the code published with the paper computes it; MixLoRA only."""
        return self._schedule(published=True) if self.config.adapter.name == "mixlora" else None

    def _schedule(self, published: bool) -> Schedule:
        optim, machine, work = self.config.train, self.config.plan, self.work
        passes = accumulation(optim, machine.gpus)
        together = optim.batch_size * passes * machine.gpus
        length = work.tokens / (1 - work.padding)
        tokens = max(1, round(length))
        labels = min(tokens, max(1, round(work.label_tokens)))
        one = asdict(self.measured.operations(tokens, labels, published))
        done = {part: together * operations for part, operations in one.items()}
        total = sum(done.values())
        steps = optim.steps or max(1, math.ceil(work.instances * optim.epochs / together))
        speed = machine.gpus * self.gpu.tflops * 1e12 * machine.mfu
        return Schedule(
            steps=steps,
            batch_size=optim.batch_size,
            accumulation=passes,
            tokens_per_step=together * length,
            **done,
            operations_per_step=total,
            hours=steps * total / speed / 3600,
        )

    @cached_property
    def fits(self) -> dict[str, Fit]:
        """By stage, in the order of `STAGES`."""
        config, text = self.config, self.measured.text_config
        checkpointing = config.train.gradient_checkpointing
        # `auto` is bf16, since every GPU of the table has it in hardware.
        bf16 = config.train.precision == "auto" or choose_dtype(config.train.precision) == torch.bfloat16
        trained, frozen = total(self.counts)
        model = Trained(trained, frozen, bf16, trains_base=config.adapter.name == "full")
        size, length, element = config.train.batch_size, config.data.max_length, 2 if bf16 else 4
        without, layer = self.measured.kept_bytes(size, length, element, checkpointing=False)
        with_it, _ = self.measured.kept_bytes(size, length, element, checkpointing=True)
        # Gradients of the widest tensors in flight: gate, up, their product, and one more being written.
        widest = 4.0 * size * length * text.intermediate_size * element
        # The loss covers the same share of the longest instances as on average.
        labels = size * self.work.label_tokens * length / self.work.tokens
        logits = labels * text.vocab_size * (element + 3 * 4)

        def needed(stage: str, instances: int, checkpointed: bool) -> Need:
            share = instances / size
            kept = with_it + layer if checkpointed else without
            return need(stage, model, config.plan.gpus, share * (kept + widest), share * logits)

        def fits(stage: str, instances: int) -> bool:
            return needed(stage, instances, checkpointing).total <= self.gpu.memory_bytes

        return {
            stage: Fit(
                fits(stage, size),
                _largest(partial(fits, stage)),
                needed(stage, size, True),
                needed(stage, size, False),
            )
            for stage in STAGES
        }

    @property
    def stage(self) -> str:
        """Stage of the configuration's own `deepspeed` group."""
        settings = (self.config.deepspeed.config or {}).get("zero_optimization")
        if not isinstance(settings, dict):
            return "none"
        stage = int(settings.get("stage", 0))
        offloads = any(key in settings for key in ("offload_param", "offload_optimizer"))
        name = f"zero{stage}" + ("_offload" if stage == 3 and offloads else "")
        return name if name in STAGES else "none"

    @property
    def own(self) -> Fit:
        return self.fits[self.stage]

    @property
    def advice(self) -> str:
        for stage, fit in self.fits.items():
            if fit.fits:
                return f"deepspeed={stage}: the first that fits, and each later one communicates more"
        stage, best = max(self.fits.items(), key=lambda item: item[1].largest_batch)
        if best.largest_batch:
            return (
                f"train.batch_size={best.largest_batch} deepspeed={stage}: this batch size fits with no stage"
            )
        return "nothing fits: more or larger GPUs, or a smaller data.max_length"

    @property
    def disk(self) -> dict[str, float]:
        """Bytes that a training writes, and the base that it reads; without the data and a few kilobytes beside."""
        trained, frozen = total(self.counts)
        added, added_trained = (
            sum(self.counts[kind][side] for kind in _ADDED if kind in self.counts)
            for side in ("frozen", "trained")
        )
        # In fp32: what was trained, and MixLoRA's frozen routers.
        adapter = 4 * (added + trained)
        features = 0.0
        if self.config.train.cache_features:  # of all pictures; an instance is taken to have one of its own
            skeleton: Any = self.measured.skeleton
            vision = skeleton.config.vision_config
            positions = (vision.image_size // getattr(vision, "patch_size", STRIDE)) ** 2
            width = next(skeleton.model.multi_modal_projector.parameters()).shape[-1]
            features = 2 * self.work.instances * positions * width
        return {
            "base": 2 * (trained + frozen - added - added_trained),  # its checkpoint in 16 bits
            "adapter": adapter,
            # All that are kept at once, and one that is being written: adapter and optimizer moments each.
            "checkpoints": (self.config.train.keep_checkpoints + 1) * (adapter + 8 * trained),
            "features": features,
        }


def count_parameters(model: nn.Module) -> Counts:
    """Parameters of each kind that the model has; a shared parameter counts once."""
    counts: Counts = {kind: {"trained": 0, "frozen": 0} for kind in _KINDS.values()}
    for name, parameter in model.named_parameters():
        kind = next(kind for part, kind in _KINDS.items() if part in name)
        counts[kind]["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return {kind: count for kind, count in counts.items() if any(count.values())}


def total(counts: Counts) -> tuple[int, int]:
    """Parameters that training changes, and those that it does not."""
    trained, frozen = (sum(count[side] for count in counts.values()) for side in ("trained", "frozen"))
    return trained, frozen


def num_instances(data: DataConfig) -> tuple[int, str]:
    """Training instances after `data.tasks` and `data.max_per_task`, and where the number comes from.

    Raises:
        UserError: they cannot be counted.
    """
    if data.source == "mini":
        return _limited(dict.fromkeys(SEEN_TASKS, MiniCounts().train), data), "counted"
    if data.source == "vision_flan":
        manifest = read_manifest(prepared_root(data))
        if manifest is not None:
            return _limited(manifest["tasks"], data), "counted"
        if data.tasks is None:
            return PUBLISHED_INSTANCES, "published"
        return 1_000 * len(data.tasks), "published, 1,000 a task"
    if data.train is None:
        raise UserError(
            "plan.instances=null: nothing to count; give data.train=<file> or plan.instances=<number>"
        )
    if data.streaming:
        raise UserError(
            "plan.instances=null: records that stream are not counted; give plan.instances=<number>"
        )
    count = 0.0
    for part in locate_files(data, "train").parts:
        tasks: Counter[str] = Counter()
        for _, raw in read_raws(part.place)[0]:
            with suppress(BadRecord):
                tasks[task_of(raw, part.task, data.task_key)] += 1
        count += part.weight * _limited(tasks, data)
    return round(count), "counted"


def _limited(tasks: dict[str, int], data: DataConfig) -> int:
    wanted = tasks if data.tasks is None else {task: tasks.get(task, 0) for task in data.tasks}
    limit = data.max_per_task
    return sum(count if limit is None else min(count, limit) for count in wanted.values())


def _largest(fits: Callable[[int], bool]) -> int:
    low, high = 0, 1
    while high <= _MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# -- what is printed and written --------------------------------------------------------------------------------------


def _show(plan: Plan, console: Console) -> None:
    machine, gpu = plan.config.plan, plan.gpu
    say(f"plan for {machine.gpus} x {gpu.label} ({gpu.memory_gib:g} GiB, {gpu.tflops:g} TFLOP/s)", console)
    show([_parameters(plan), _memory(plan)], console)
    say(
        f"as configured (*), deepspeed={plan.stage}: {'fits' if plan.own.fits else 'does not fit'} on "
        f"{machine.gpus} x {gpu.label}. To take: {plan.advice}",
        console,
    )
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
        "disk": plan.disk,
        "mfu": machine.mfu,
        "time": asdict(plan.schedule),
        "time_published_code": None if plan.published is None else asdict(plan.published),
    }
