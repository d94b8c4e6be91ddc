"""What a training would need, from its configuration; no weight and no picture is loaded."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from mixlora_cli.analysis.gpu_memory import (
    GPUS,
    STAGES,
    Gpu,
    Need,
    Trained,
    need,
    quantise,
)
from mixlora_cli.analysis.meta_step import MetaStep
from mixlora_cli.config import DataConfig, DeepspeedConfig, GpuName, PlanConfig
from mixlora_cli.config.groups import Quantization
from mixlora_cli.data.loading import locate_files, prepared_root, read_manifest
from mixlora_cli.data.mini.plan import Counts as MiniCounts
from mixlora_cli.data.mini.seen import SEEN_TASKS
from mixlora_cli.data.mini.text import TEXT_COUNTS, TEXT_TASKS
from mixlora_cli.data.problems import BadRecord
from mixlora_cli.data.records import task_of
from mixlora_cli.data.sources import read_raws
from mixlora_cli.errors import UserError
from mixlora_cli.method.targets import decoder_linears
from mixlora_cli.models.forward import choose_dtype
from mixlora_cli.models.skeleton import attach_to_skeleton, build_skeleton
from mixlora_cli.training.arguments import accumulation

PUBLISHED_INSTANCES = 191_105
"""Vision-Flan with up to 1,000 instances a task (Shen et al., section 5.1)."""
TEXT_TOKENS = 144
"""Tokens of an instance of Vision-Flan that are not its picture's, an estimate: instruction and options 90, answer 12,
template 42. See docs/paper-scale.md."""
PADDING_GROUPED, PADDING_RANDOM = 0.02, 0.2
"""Share of padding in batches of similar length, and in batches drawn at random; estimates."""
_MOST = 4096
"""Batches larger than this are not looked for."""
SMALL_CARD: GpuName = "rtx4090"
"""The card that people have at home."""
_ADDED = {"mixlora_factors": "factors", "lora_A": "factors", "lora_B": "factors", "mixlora_router": "routers"}
"""What an adapter adds, by a part of its name."""
_KINDS = ("factors", "routers", "projector", "vision tower", "language model")


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
class Way:
    """How to train: what changes the memory that it takes."""

    batch_size: int
    checkpointing: bool
    quantization: Quantization

    def overrides(self, other: Way, accumulation: int) -> str:
        """What to add to the command of `other`, whose accumulation that is, for steps of as many instances."""
        keys = {
            "train.batch_size": (self.batch_size, other.batch_size),
            "train.accumulation": (accumulation * other.batch_size // self.batch_size, accumulation),
            "train.gradient_checkpointing": (
                str(self.checkpointing).lower(),
                str(other.checkpointing).lower(),
            ),
            "model.quantization": (self.quantization, other.quantization),
        }
        return " ".join(f"{key}={new}" for key, (new, old) in keys.items() if new != old)


@dataclass(frozen=True)
class Fit:
    """One ZeRO stage on the chosen GPUs; a batch is taken to be as long as the configuration allows."""

    fits: bool
    """As configured."""
    largest_batch: int
    """Instances per GPU and forward pass that fit, with checkpointing as configured; 0 = not even one."""
    with_checkpointing: Need
    without_checkpointing: Need


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
        projector = config.model.train_also
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
            picture = self.measured.picture
            tokens = float(TEXT_TOKENS + (0 if picture is None else picture.tokens))
            assumed.append("tokens of an instance")
        if padding is None:
            train = self.config.train
            padding = PADDING_GROUPED if train.group_by_length else PADDING_RANDOM
            if train.packing:
                padding = 0.0
            else:
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

    def need(self, way: Way, stage: str, gpus: int) -> Need:
        """Memory of each of `gpus` that train in this way; a batch is as long as the configuration allows."""
        trained, frozen = total(self.counts)
        quantised = None
        if way.quantization != "none":
            quantised = quantise([layer.weight.shape for layer in self.linears], way.quantization)
        full = self.config.adapter.name == "full"
        model = Trained(trained, frozen, self._element == 2, full, quantised)
        kept, logits = self._of_an_instance[way.checkpointing]
        return need(stage, model, gpus, way.batch_size * kept, way.batch_size * logits)

    @cached_property
    def linears(self) -> list[nn.Linear]:
        """Of the decoder: what is quantised, if anything is."""
        skeleton = self.measured.skeleton
        names = decoder_linears(skeleton)
        assert isinstance(names, str)
        return [
            module
            for name, module in skeleton.named_modules()
            if isinstance(module, nn.Linear) and re.fullmatch(names, name)
        ]

    @property
    def _element(self) -> int:
        """Bytes of an activation; `auto` is bf16, since every GPU of the table has it in hardware."""
        precision = self.config.train.precision
        return 2 if precision == "auto" or choose_dtype(precision) == torch.bfloat16 else 4

    @cached_property
    def _of_an_instance(self) -> dict[bool, tuple[float, float]]:
        """Bytes of activations and of logits, without and with checkpointing."""
        size, length, element = self.config.train.batch_size, self.config.data.max_length, self._element
        without, layer = self.measured.kept_bytes(size, length, element, checkpointing=False)
        with_it, _ = self.measured.kept_bytes(size, length, element, checkpointing=True)
        # Gradients of the widest tensors in flight: gate, up, their product, and one more being written.
        widest = 4.0 * size * length * max(linear.in_features for linear in self.linears) * element
        # The loss covers the same share of the longest instances as on average.
        labels = size * self.work.label_tokens * length / self.work.tokens
        head: Any = self.measured.skeleton.get_output_embeddings()
        logits = labels * head.out_features * (element + 3 * 4)
        return {
            checkpointed: ((kept + widest) / size, logits / size)
            for checkpointed, kept in ((False, without), (True, with_it + layer))
        }

    @property
    def way(self) -> Way:
        """As configured."""
        train = self.config.train
        return Way(train.batch_size, train.gradient_checkpointing, self.config.model.quantization)

    @cached_property
    def fits(self) -> dict[str, Fit]:
        """By stage, in the order of `STAGES`."""
        gpus, way = self.config.plan.gpus, self.way

        def needed(stage: str, checkpointing: bool) -> Need:
            return self.need(replace(way, checkpointing=checkpointing), stage, gpus)

        return {
            stage: Fit(
                self.need(way, stage, gpus).total <= self.gpu.memory_bytes,
                self.largest_batch(way, self.gpu, stage, gpus),
                needed(stage, True),
                needed(stage, False),
            )
            for stage in STAGES
        }

    def largest_batch(self, way: Way, gpu: Gpu, stage: str = "none", gpus: int = 1) -> int:
        """Instances per GPU and forward pass that fit in this way otherwise; 0 = not even one."""
        return _largest(
            lambda size: self.need(replace(way, batch_size=size), stage, gpus).total <= gpu.memory_bytes
        )

    @cached_property
    def quantizations(self) -> tuple[Quantization, ...]:
        """Those that the configuration allows on one card: as it is, and in four bits."""
        config, own = self.config, self.config.model.quantization
        try:
            replace(config, model=replace(config.model, quantization="nf4"), deepspeed=DeepspeedConfig())
        except ValueError:
            return (own,)
        return tuple(dict.fromkeys((own, "nf4")))

    @cached_property
    def small_card(self) -> tuple[Need, Way | None]:
        """What one card of 24 GB would have to hold as configured, and the first way to train on it that fits.

        Tried in this order: as configured, a smaller batch, checkpointing, both, and each of these in four bits. A
        smaller batch divides the configured one, so that more accumulation makes the same steps.
        """
        card, own = GPUS[SMALL_CARD], self.way
        sizes = [size for size in range(own.batch_size, 0, -1) if own.batch_size % size == 0]

        def fitting(way: Way) -> Iterator[Way]:
            for batch_size in sizes:
                smaller = replace(way, batch_size=batch_size)
                if self.need(smaller, "none", 1).total <= card.memory_bytes:
                    yield smaller

        ways = (
            way
            for quantization in self.quantizations
            for checkpointing in sorted({own.checkpointing, True})
            for way in fitting(Way(own.batch_size, checkpointing, quantization))
        )
        return self.need(own, "none", 1), next(ways, None)

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
            sum(self.counts[kind][side] for kind in {*_ADDED.values()} if kind in self.counts)
            for side in ("frozen", "trained")
        )
        # In fp32: what was trained, and MixLoRA's frozen routers.
        adapter = 4 * (added + trained)
        features = 0.0
        picture = self.measured.picture
        if self.config.train.cache_features and picture is not None and picture.cacheable:
            # Of all pictures; an instance is taken to have one of its own.
            vision: Any = self.measured.skeleton.config.vision_config
            positions = (vision.image_size // vision.patch_size) ** 2
            features = 2 * self.work.instances * positions * vision.hidden_size
        return {
            "base": 2 * (trained + frozen - added - added_trained),  # its checkpoint in 16 bits
            "adapter": adapter,
            # All that are kept at once, and one that is being written: adapter and optimizer moments each.
            "checkpoints": (self.config.train.keep_checkpoints + 1) * (adapter + 8 * trained),
            "features": features,
        }


def count_parameters(model: PreTrainedModel | PeftModel) -> Counts:
    """Parameters of each kind that the model has; a shared parameter counts once.

    The language model is the decoder with its embeddings and its output layer, the vision tower what transformers
    names as the encoder of pictures; what lies in neither joins them: the projector.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    tower = base.get_encoder(modality="image")
    has_tower = tower is not None and tower is not base and tower is not base.base_model
    parts = {
        "vision tower": [tower] if has_tower else [],
        "language model": [base.get_decoder(), base.get_output_embeddings(), base.get_input_embeddings()],
    }
    kinds = {
        id(parameter): kind
        for kind, roots in parts.items()
        for root in roots
        for parameter in root.parameters()
    }
    counts: Counts = {kind: {"trained": 0, "frozen": 0} for kind in _KINDS}
    for name, parameter in model.named_parameters():
        added = (kind for part, kind in _ADDED.items() if part in name)
        kind = next(added, kinds.get(id(parameter), "projector"))
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
    if data.source == "mini_text":
        seen = [each.name for each in TEXT_TASKS if not each.unseen]
        return _limited(dict.fromkeys(seen, TEXT_COUNTS.train), data), "counted"
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
