"""How a forward pass is run: in which number format, and with logits and a loss for the answer's tokens alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mixlora_cli.data.encode import IGNORE


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


@contextmanager
def with_head_input(head: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `head` gets `change(hidden)` in the place of its hidden states (batch, length, d).

    Worth it where they are a slice of longer ones: torch multiplies a three-dimensional slice row by row, with a copy
    of the head's whole weight for each, which is 1.8 GB for 32 rows of the small model.
    """

    def changed(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(changed)
    try:
        yield
    finally:
        handle.remove()


def head_sees_only(head: nn.Module, predicts: Tensor) -> AbstractContextManager[None]:
    """Inside, `head` maps hidden states (batch, length, d) to logits (n, vocabulary) of the `predicts` tokens alone.

    The head is the widest matrix product of a small model, and most tokens (image, question) carry no label.
    """
    return with_head_input(head, lambda hidden: hidden[predicts.to(hidden.device)])


def label_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the model predicts a labelled token, and which token that is.

    Args:
        labels: (batch, length); `labels[:, t]` is token t, or -100 without loss.

    Returns:
        `predicts` (batch, length) bool: the *next* token carries a label; `targets` (n,): those tokens in row order.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    predicts = following != IGNORE
    return predicts, following[predicts]


def labelled_pass(
    model: nn.Module, inputs: dict[str, Any], head: nn.Module, tells_prompt: bool
) -> tuple[Any, Tensor, Tensor]:
    """Run a batch with labels, as training does, and compute no other logits than the labelled tokens'.

    Args:
        model: what is called with `inputs`; may be wrapped.
        inputs: of the collator; `labels` are taken out, and nothing is kept for a next token.
        head: the model's output layer.
        tells_prompt: hand on which tokens are the prompt, for a MixLoRA adapter: its routing may depend on the prompt
            alone, and the labels that would tell it stay here.

    Returns:
        The outputs with logits (n, vocabulary), where these are predicted (batch, length), and which tokens (n,).
    """
    labels: Tensor = inputs.pop("labels")
    inputs["use_cache"] = False
    if tells_prompt:
        inputs["prompt_mask"] = labels == IGNORE
    predicts, targets = label_positions(labels)
    with head_sees_only(head, predicts):
        return model(**inputs), predicts, targets


def token_loss(logits: Tensor, targets: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Sum of cross entropies in fp32 over `num_tokens`, the label tokens of the whole optimizer step.

    Dividing by the step's count instead of this batch's makes accumulation and data parallelism exact: every
    token weighs the same however the step was cut into batches. No target (n = 0) gives a zero with a gradient
    of zero.
    """
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / torch.as_tensor(num_tokens, device=total.device).clamp(min=1)
