"""Which ZeRO stages fit on the GPUs, the largest batch that does, and which stage to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mixlora_cli.analysis.planning.activations import Numerics, activations
from mixlora_cli.analysis.planning.hardware import Gpu
from mixlora_cli.analysis.planning.memory import STAGES, Need, Trained, state
from mixlora_cli.analysis.planning.network import Network
from mixlora_cli.analysis.planning.operations import Batch
from mixlora_cli.analysis.planning.schedule import Workload
from mixlora_cli.config import PlanConfig

_MOST = 4096
"""Batches larger than this are not looked for."""


@dataclass(frozen=True)
class Fit:
    """One ZeRO stage on the chosen GPUs; a batch is taken to be as long as the configuration allows."""

    with_checkpointing: Need
    without_checkpointing: Need
    largest_batch: int
    """Instances per GPU and forward pass that fit, with checkpointing as configured; 0 = not even one."""
    fits: bool
    """As configured."""

    @property
    def stage(self) -> str:
        return self.with_checkpointing.stage


def fits_of(
    config: PlanConfig, network: Network, model: Trained, work: Workload, gpu: Gpu
) -> tuple[Fit, ...]:
    """Every stage, in the order of `STAGES`."""
    return tuple(_fit(stage, config, network, model, work, gpu) for stage in STAGES)


def _fit(stage: str, config: PlanConfig, network: Network, model: Trained, work: Workload, gpu: Gpu) -> Fit:
    checkpointing = config.train.gradient_checkpointing

    def need(size: int, checkpointed: bool) -> Need:
        batch = longest_batch(size, config.data.max_length, work)
        held = activations(network, batch, numerics_of(model), checkpointed)
        return Need(stage, state(stage, model, config.plan.gpus), held)

    size = config.train.batch_size
    chosen = need(size, checkpointing)
    return Fit(
        with_checkpointing=need(size, True),
        without_checkpointing=need(size, False),
        largest_batch=_largest(lambda n: need(n, checkpointing).fits(gpu.memory_bytes)),
        fits=chosen.fits(gpu.memory_bytes),
    )


def longest_batch(size: int, max_length: int, work: Workload) -> Batch:
    """A batch of the longest instances that are allowed; the loss covers the same share of them as on average."""
    return Batch(size, max_length, work.label_tokens * max_length / work.tokens)


def numerics_of(model: Trained) -> Numerics:
    """Sizes of activations on a GPU."""
    element = 2 if model.bf16 else 4
    return Numerics(element, residual=4 if model.trains_base else element)


def _largest(fits: Callable[[int], bool]) -> int:
    low, high = 0, 1
    while high <= _MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def advise(fits: tuple[Fit, ...]) -> str:
    """The stage to take: the first that fits, because each later one communicates more."""
    for fit in fits:
        if fit.fits:
            return f"deepspeed={fit.stage}: the first that fits, and each later one communicates more"
    best = max(fits, key=lambda fit: fit.largest_batch)
    if best.largest_batch:
        return f"train.batch_size={best.largest_batch} deepspeed={best.stage}: this batch size fits with no stage"
    return "nothing fits: more or larger GPUs, or a smaller data.max_length"


def chosen_stage(config: PlanConfig) -> str:
    """Stage of the configuration's own `deepspeed` group."""
    settings = (config.deepspeed.config or {}).get("zero_optimization")
    if not isinstance(settings, dict):
        return "none"
    stage = int(settings.get("stage", 0))
    offloads = any(key in settings for key in ("offload_param", "offload_optimizer"))
    name = f"zero{stage}" + ("_offload" if stage == 3 and offloads else "")
    return name if name in STAGES else "none"
