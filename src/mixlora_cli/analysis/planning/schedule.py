"""Steps and hours of a training, from the operations of its batches and a share of the GPUs' peak."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mixlora_cli.analysis.planning.hardware import Gpu
from mixlora_cli.analysis.planning.network import Network
from mixlora_cli.analysis.planning.operations import Batch, Operations, operations
from mixlora_cli.config import MachineConfig, OptimConfig
from mixlora_cli.training.accumulation import accumulation

TEXT_TOKENS = 144
"""Tokens of an instance of Vision-Flan that are not its picture's, an estimate: instruction and options 90, answer 12,
template 42. See docs/paper-scale.md."""
PADDING_GROUPED, PADDING_RANDOM = 0.02, 0.2
"""Share of padding in batches of similar length, and in batches drawn at random; estimates."""


@dataclass(frozen=True)
class Workload:
    """What a training's data looks like to the GPUs."""

    instances: int
    tokens: float
    """Mean of an instance, image tokens included, padding not."""
    padding: float
    label_tokens: float
    assumed: tuple[str, ...]
    """Which of these are estimates, in words."""

    @property
    def length(self) -> float:
        """Mean tokens that an instance costs, padding included."""
        return self.tokens / (1 - self.padding)


@dataclass(frozen=True)
class Schedule:
    """Steps and what they cost."""

    world_size: int
    batch_size: int
    accumulation: int
    steps: int
    tokens_per_step: float
    """Over all GPUs, padding included."""
    operations: Operations
    """Of one step over all GPUs."""
    hours: float


def read_workload(machine: MachineConfig, optim: OptimConfig, network: Network, instances: int) -> Workload:
    """The configured numbers, and estimates where they are null."""
    assumed = ["label tokens"]
    tokens, padding = machine.tokens, machine.padding
    if tokens is None:
        tokens = float(network.image_tokens + TEXT_TOKENS)
        assumed.append("tokens of an instance")
    if padding is None:
        padding = PADDING_GROUPED if optim.group_by_length else PADDING_RANDOM
        assumed.append("padding")
    return Workload(instances, tokens, padding, machine.label_tokens, tuple(assumed))


def make_schedule(
    network: Network,
    optim: OptimConfig,
    work: Workload,
    machine: MachineConfig,
    gpu: Gpu,
    dense: bool = False,
) -> Schedule:
    """Steps and hours.

    Args:
        dense: time the operations of the code published with the paper (`operations.operations`).

    Raises:
        UserError: `train.effective_batch` cannot be split over the GPUs.
    """
    passes = accumulation(optim, machine.gpus)
    together = optim.batch_size * passes * machine.gpus
    steps = optim.steps or max(1, math.ceil(work.instances * optim.epochs / together))
    batch = Batch(together, work.length, work.label_tokens)
    done = operations(network, batch, optim.gradient_checkpointing, optim.cache_features, dense)
    speed = machine.gpus * gpu.tflops * 1e12 * machine.mfu
    return Schedule(
        machine.gpus,
        optim.batch_size,
        passes,
        steps,
        together * work.length,
        done,
        steps * done.total / speed / 3600,
    )
