"""Which floating-point type the matrix products run in, and how fp32 adapters live in a bf16 base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def choose_dtype(precision: Literal["auto", "fp32", "bf16"]) -> torch.dtype:
    """Return the type of the frozen base and of the matrix products.

    `auto` asks the hardware what it is, never a clock: the same machine must always give the same run.
    """
    if precision == "auto":
        return torch.bfloat16 if multiplies_bf16() else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def number_format(precision: Literal["auto", "fp32", "bf16"]) -> str:
    """What `precision` means on this machine: `float32` or `bfloat16`."""
    return str(choose_dtype(precision)).removeprefix("torch.")


def multiplies_bf16() -> bool:
    """True where bf16 matrix products run in hardware: a GPU that has them, or a CPU with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@contextmanager
def inputs_keep_their_dtype(model: nn.Module) -> Iterator[None]:
    """Under autocast: stop PEFT's layers from casting their input up to the fp32 of their master weights.

    Autocast casts the small adapter weights down instead, so the low-rank product stays in bf16 like the layer around
    it. PEFT's own `disable_input_dtype_casting` does the same but fails on layers that have no such switch.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and getattr(module, "cast_input_dtype_enabled", False)
    ]
    for layer in layers:
        layer.cast_input_dtype_enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True  # type: ignore[assignment]


@contextmanager
def matrix_products_in(model: nn.Module, dtype: torch.dtype, device_type: str) -> Iterator[None]:
    """Run `model` as training runs it: bf16 products over fp32 adapters, or plain fp32."""
    if dtype == torch.float32:
        yield
        return
    with inputs_keep_their_dtype(model), torch.autocast(device_type, dtype=dtype):
        yield
