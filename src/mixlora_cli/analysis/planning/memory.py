"""Memory of one GPU while it trains, by how DeepSpeed ZeRO shares it out.

Sources: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 3:
with bf16 weights and gradients, mixed-precision Adam keeps 12 bytes a trained parameter (fp32 weight and two moments).
"""

from __future__ import annotations

from dataclasses import dataclass

from mixlora_cli.analysis.planning.activations import Activations
from mixlora_cli.analysis.planning.hardware import GIB

STAGES = ("none", "zero1", "zero2", "zero3", "zero3_offload")
"""In the order of how much they communicate: the first that fits is the one to take."""
CONTEXT_BYTES = 1.5 * GIB
"""CUDA's context, libraries' workspaces and NCCL's buffers: what a process holds before any tensor."""
FRAGMENTATION = 0.05
"""Of activations: what the allocator cannot use."""
_BUCKET = 500_000_000
"""DeepSpeed's default size of the buckets that gradients are reduced in, in numbers."""
_LIVE = 1_000_000_000
"""ZeRO-3's default of parameters that may be gathered at once (`stage3_max_live_parameters`)."""
_HALF, _FLOAT, _MOMENTS, _ADAM = 2, 4, 8, 12


@dataclass(frozen=True)
class Trained:
    """What the state's size follows from."""

    trained: int
    frozen: int
    bf16: bool
    trains_base: bool
    """`adapter=full`: without DeepSpeed the base, its frozen parts too, is loaded in fp32."""


@dataclass(frozen=True)
class State:
    """Bytes that do not depend on the batch, on each GPU; `host` is the main memory of all processes together."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    """Context and communication buffers."""
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the GPU."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def state(stage: str, model: Trained, gpus: int) -> State:
    """Weights, gradients and optimizer states on each of `gpus`.

    Args:
        stage: one of `STAGES`; `none` is torch's data parallel with fp32 master weights under autocast.

    Raises:
        KeyError: another stage.
    """
    if stage == "none" or not model.bf16:
        return _shared_out(stage, _plain(model, gpus if stage == "none" else 1), gpus)
    parts = State(
        weights=_HALF * (model.frozen + model.trained),
        gradients=_HALF * model.trained,
        optimizer=_ADAM * model.trained,
        buffers=CONTEXT_BYTES,
    )
    return _shared_out(stage, parts, gpus)


def _plain(model: Trained, gpus: int) -> State:
    """Without DeepSpeed, or all in fp32: trained weights in fp32, with their bf16 copies while autocast is on."""
    frozen = _FLOAT if model.trains_base or not model.bf16 else _HALF
    copies = _HALF * model.trained if model.bf16 else 0
    return State(
        weights=frozen * model.frozen + _FLOAT * model.trained + copies,
        # Data parallel reduces gradients in buckets of its own.
        gradients=_FLOAT * model.trained * (2 if gpus > 1 else 1),
        optimizer=_MOMENTS * model.trained,
        buffers=CONTEXT_BYTES,
    )


def _shared_out(stage: str, whole: State, gpus: int) -> State:
    """Each stage shares out one thing more: optimizer states, gradients, weights; offload moves them off the GPU."""
    share_weights, share_gradients, share_optimizer = {
        "none": (1, 1, 1),
        "zero1": (1, 1, gpus),
        "zero2": (1, gpus, gpus),
        "zero3": (gpus, gpus, gpus),
        "zero3_offload": (gpus, gpus, gpus),
    }[stage]
    buffers = whole.buffers
    if stage != "none":
        buffers += min(_HALF * _BUCKET, whole.gradients)
    if stage.startswith("zero3"):
        buffers += min(_HALF * _LIVE, whole.weights)
    parts = State(
        whole.weights / share_weights,
        whole.gradients / share_gradients,
        whole.optimizer / share_optimizer,
        buffers,
    )
    if stage != "zero3_offload":
        return parts
    return State(0.0, 0.0, 0.0, buffers, host=whole.weights + whole.gradients + whole.optimizer)


@dataclass(frozen=True)
class Need:
    """Memory of one GPU in bytes: state and one batch."""

    stage: str
    state: State
    activations: Activations

    @property
    def overhead(self) -> float:
        """Context, communication buffers and what the allocator cannot use."""
        return self.state.buffers + FRAGMENTATION * self.activations.total

    @property
    def total(self) -> float:
        """All of it."""
        return self.state.total + (1 + FRAGMENTATION) * self.activations.total

    def fits(self, capacity: float) -> bool:
        """Whether a GPU with so many bytes can hold it."""
        return self.total <= capacity
