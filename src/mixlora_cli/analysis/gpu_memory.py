"""Memory of one GPU while it trains, by how DeepSpeed ZeRO shares it out.

Sources: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 3:
with bf16 weights and gradients, mixed-precision Adam keeps 12 bytes a trained parameter (fp32 weight and two moments).
Dettmers et al., "QLoRA" (2023), section 3: NF4 has 4 bits a weight, a scale of 8 bits for each block of 64, and one of
32 bits for each 256 of these.
GPUs: memory that a process can use and dense bf16 throughput, from the makers' data sheets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mixlora_cli.config import GpuName

GIB = 2**30
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
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
_SHARED_OUT = {"none": "", "zero1": "o", "zero2": "go", "zero3": "wgo", "zero3_offload": "wgo"}
"""Each stage shares out one thing more: optimizer states, gradients, weights."""


@dataclass(frozen=True)
class Gpu:
    """One accelerator."""

    label: str
    memory_gib: float
    """What `nvidia-smi` reports, in GiB: less than the number on the box, which is in GB and partly reserved."""
    tflops: float
    """Dense bf16 products with fp32 sums, 10^12 operations a second."""

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB


GPUS: dict[GpuName, Gpu] = {
    "a100-40gb": Gpu("A100 40 GB", 39.6, 312),
    "a100-80gb": Gpu("A100 80 GB", 79.3, 312),
    "h100": Gpu("H100 SXM 80 GB", 79.6, 989),
    "h200": Gpu("H200 141 GB", 140.4, 989),
    "l40s": Gpu("L40S 48 GB", 45.0, 362),
    "rtx4090": Gpu("RTX 4090 24 GB", 24.0, 165),
}


@dataclass(frozen=True)
class Quantised:
    """Frozen linear layers in few bits."""

    numbers: int
    """Weights that they have."""
    bytes: float
    """That these take, scales included."""
    largest: int
    """Weights of the largest: a product takes place with a copy of one layer in the type that is computed in."""


def quantise(shapes: Iterable[Sequence[int]], quantization: Literal["nf4", "int8"]) -> Quantised:
    """What linear layers (d_out, d_in) are in NF4 with quantised scales, or in int8 with an fp32 scale a row."""
    sizes = [(rows * columns, rows) for rows, columns in shapes]
    numbers, rows = sum(size for size, _ in sizes), sum(count for _, count in sizes)
    held = numbers * _NF4_BITS / 8 if quantization == "nf4" else numbers + _FLOAT * rows
    return Quantised(numbers, held, max(size for size, _ in sizes))


@dataclass(frozen=True)
class Trained:
    """What the state's size follows from."""

    trained: int
    frozen: int
    bf16: bool
    trains_base: bool
    """`adapter=full`: without DeepSpeed the base, its frozen parts too, is loaded in fp32."""
    quantised: Quantised | None = None
    """What of the frozen weights is held in few bits."""


@dataclass(frozen=True)
class Need:
    """Memory of one GPU in bytes while it trains on a batch."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept from forward to backward, and beside that while one layer's backward runs; without the logits."""
    logits: float
    """Logits of the label tokens in bf16 and fp32, their log-probabilities and gradient."""
    overhead: float
    """Context, communication buffers, a copy of one quantised layer, and what the allocator cannot use."""
    total: float
    """The fullest moment, taken as everything at once."""
    host: float
    """Main memory of all processes together."""


def need(stage: str, model: Trained, gpus: int, activations: float, logits: float) -> Need:
    """What each of `gpus` has to hold.

    Args:
        stage: one of `STAGES`; `none` is torch's data parallel with fp32 master weights under autocast.
        model: what is trained.
        gpus: of all nodes together.
        activations: of one GPU's batch, in bytes.
        logits: likewise.

    Raises:
        KeyError: another stage.
    """
    shared = _SHARED_OUT[stage]
    few = model.quantised or Quantised(0, 0.0, 0)
    unquantised = model.frozen - few.numbers
    if stage == "none" or not model.bf16:
        frozen = _FLOAT if model.trains_base or not model.bf16 else _HALF
        copies = _HALF * model.trained if model.bf16 else 0  # while autocast is on
        weights: float = frozen * unquantised + few.bytes + _FLOAT * model.trained + copies
        # Data parallel reduces gradients in buckets of its own.
        gradients: float = _FLOAT * model.trained * (2 if stage == "none" and gpus > 1 else 1)
        optimizer: float = _MOMENTS * model.trained
    else:
        weights, gradients = _HALF * (unquantised + model.trained) + few.bytes, _HALF * model.trained
        optimizer = _ADAM * model.trained
    overhead = CONTEXT_BYTES + FRAGMENTATION * (activations + logits)
    overhead += (_HALF if model.bf16 else _FLOAT) * few.largest
    if stage != "none":
        overhead += min(_HALF * _BUCKET, gradients)
    if "w" in shared:
        overhead += min(_HALF * _LIVE, weights)
    host = 0.0
    if stage == "zero3_offload":
        weights, gradients, optimizer, host = 0, 0, 0, float(weights + gradients + optimizer)
    weights = weights / (gpus if "w" in shared else 1)
    gradients = gradients / (gpus if "g" in shared else 1)
    optimizer = optimizer / (gpus if "o" in shared else 1)
    total = weights + gradients + optimizer + activations + logits + overhead
    return Need(weights, gradients, optimizer, activations, logits, overhead, total, host)
