"""What a training step computes and keeps, measured on torch's meta device: tensors with shapes and no memory.

One forward and backward pass of the model with one decoder layer, and with two; what the second adds, each further one
adds. Any family of models works whose decoder layers are alike. Kernels are those of a GPU: fused attention is the
memory-efficient one, a dropout mask has a byte a number, autocast casts what it would cast there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from mixlora_cli.analysis.bench.counters import Operations, count_operations, saved_bytes
from mixlora_cli.analysis.bench.layers import into_published_form
from mixlora_cli.config import TrainConfig
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.forward import inputs_keep_their_dtype
from mixlora_cli.routers import ROUTERS

META = torch.device("meta")
_FUSED = "mixlora_fused_on_meta"
_PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm)


@dataclass(frozen=True)
class StepOperations:
    """Floating-point operations of an instance's matrix products (two for each multiplication)."""

    forward: float
    backward: float
    recomputation: float
    """Of gradient checkpointing."""
    vision: float
    """Tower and projector forward, and the projector's backward where it is trained."""


@dataclass(frozen=True)
class MetaStep:
    """A training's steps, to be measured."""

    skeleton: PreTrainedModel
    """The model without adapter, on the meta device."""
    config: TrainConfig

    @cached_property
    def text_config(self) -> Any:
        return self.skeleton.config.get_text_config()

    def operations(self, length: int, labels: int, published: bool = False) -> StepOperations:
        """Operations of one instance, as configured.

        Args:
            length: tokens, image tokens and padding included.
            labels: tokens that carry loss; the head works on these alone.
            published: with MixLoRA's layers as the code published with the paper computes them: it forms the matrix
                (d_in, d_out) of every instance and multiplies every token with it.
        """

        checkpointing = self.config.train.gradient_checkpointing
        gradient = torch.empty(1, labels, self.text_config.vocab_size, device=META)

        def counted(num_layers: int) -> tuple[Operations, int]:
            model = self._built(num_layers)
            if published:
                with META:
                    into_published_form(model)
            inputs = self._inputs(model, 1, length, checkpointing)

            def run() -> Operations:
                with _autocast_on_meta():
                    return count_operations(
                        lambda: model(**inputs, logits_to_keep=labels, use_cache=False).logits, gradient
                    )

            done, head = run(), 2 * labels * gradient.shape[-1] * self.text_config.hidden_size
            if not checkpointing:
                return done, 0
            if published:  # under torch's older kind of checkpointing, which computes everything again
                return done, done.forward - head
            _checkpoint(model)
            return done, run().backward - done.backward

        (one, again), (two, again_two) = counted(1), counted(2)
        return StepOperations(
            self._extended(one.forward, two.forward),
            self._extended(one.backward, two.backward),
            self._extended(again, again_two),
            self._vision(),
        )

    def kept_bytes(
        self, instances: int, length: int, element: int, checkpointing: bool
    ) -> tuple[float, float]:
        """Bytes that a forward pass keeps for its backward pass: of all layers, and of one; logits left out.

        Args:
            instances: of the batch.
            length: tokens of each.
            element: bytes of an activation: 2 for bf16, 4 for fp32.
            checkpointing: with gradient checkpointing.
        """

        def kept(num_layers: int) -> int:
            model = self._built(num_layers, bf16=element == 2)
            if checkpointing:
                _checkpoint(model)
            inputs = self._inputs(model, instances, length, checkpointing)
            with _autocast_on_meta(), inputs_keep_their_dtype(model), _AsOnGpu(bf16=element == 2) as gpu:
                return saved_bytes(
                    lambda: model(**inputs, logits_to_keep=1, use_cache=False), model, gpu.copies.values()
                )

        one, two = kept(1), kept(2)
        return self._extended(one, two), two - one

    def _extended(self, one: float, two: float) -> float:
        """Of the whole model, from what it is with one and with two layers."""
        further = int(self.text_config.num_hidden_layers) - 1
        return one + further * (two - one)

    def _built(self, num_layers: int, bf16: bool = False) -> nn.Module:
        model: Any = self._base(num_layers)
        config = self.config
        with META:
            if bf16 and config.adapter.name != "full":
                model = model.to(torch.bfloat16)
            adapted = attach_adapter(
                model,
                config.adapter,
                config.routing,
                config.rank,
                config.factors,
                config.model.train_also,
            )
        built: nn.Module = adapted.train()
        return built

    def _base(self, num_layers: int) -> PreTrainedModel:
        """The model with so many layers, and its tower too if that has layers."""
        config = copy.deepcopy(self.skeleton.config)
        for part in (config.get_text_config(), config.vision_config):
            if hasattr(part, "num_hidden_layers"):
                part.num_hidden_layers = num_layers
        config._attn_implementation = "eager" if self.config.model.attn_implementation == "eager" else _FUSED
        with META:
            return type(self.skeleton)(config)

    def _inputs(self, model: Any, instances: int, length: int, checkpointing: bool) -> dict[str, Tensor]:
        """Embedded tokens, as if pictures were among them, and a mask, since batches have padding."""
        embeddings = model.get_input_embeddings().weight
        # With checkpointing PEFT makes the embeddings' output require a gradient.
        into_embeddings = (
            self.config.adapter.name == "full" or bool(self.config.model.train_also) or checkpointing
        )
        hidden = torch.empty(instances, length, embeddings.shape[1], dtype=embeddings.dtype, device=META)
        inputs = {
            "inputs_embeds": hidden.requires_grad_(into_embeddings),
            "attention_mask": torch.ones(instances, length, dtype=torch.bool, device=META),
        }
        if self.config.adapter.name == "mixlora" and ROUTERS[self.config.routing.name].source == "task":
            inputs["task_embeddings"] = torch.empty(instances, embeddings.shape[1], device=META)
        return inputs

    def _vision(self) -> float:
        config: Any = self.skeleton.config
        train_projector = bool(self.config.model.train_also)

        def tower(num_layers: int) -> int:
            model: Any = self._base(num_layers).requires_grad_(False)
            size = config.vision_config.image_size
            pixels = torch.empty(1, 3, size, size, device=META)
            return _forward_operations(lambda: model.model.vision_tower(pixels))

        done = 0
        if not self.config.train.cache_features:
            one, two = tower(1), tower(2)
            done += one + (getattr(config.vision_config, "num_hidden_layers", 1) - 1) * (two - one)
        whole: Any = self._base(1)
        projector = whole.model.multi_modal_projector.requires_grad_(train_projector)
        width = next(projector.parameters()).shape[-1]
        features = torch.empty(1, config.image_seq_length, width, device=META)
        if not train_projector:
            return done + _forward_operations(lambda: projector(features))
        return done + count_operations(lambda: projector(features), projector(features).detach()).total


def _checkpoint(model: Any) -> None:
    """Switch gradient checkpointing on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable`", FutureWarning)  # its name in 5.0
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _forward_operations(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """Inside, the meta device has an autocast, switched off; torch refuses to say so, and MixLoRA's layers ask."""
    is_enabled, autocast = torch.is_autocast_enabled, torch.autocast
    settings: Any = torch
    settings.is_autocast_enabled = lambda kind="cuda": kind != META.type and is_enabled(kind)
    settings.autocast = lambda kind, **rest: nullcontext() if kind == META.type else autocast(kind, **rest)
    try:
        yield
    finally:
        settings.is_autocast_enabled, settings.autocast = is_enabled, autocast


class _AsOnGpu(TorchFunctionMode):
    """Inside, the forward pass of a model on the meta device saves what it would save on a GPU under autocast."""

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self._bf16 = bf16
        self.copies: dict[int, Tensor] = {}
        """Of trained weights, which autocast makes once in a pass."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if self._bf16 and func in _PRODUCTS:
            args = tuple(self._in_bf16(value) if isinstance(value, Tensor) else value for value in args)
        return func(*args, **kwargs)

    def _in_bf16(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32 or not isinstance(tensor, nn.Parameter):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self.copies:
            self.copies[id(tensor)] = tensor.to(torch.bfloat16)
        return self.copies[id(tensor)]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p else input


def _fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """(B, heads, S, d) each, mask (B, 1, S, S) -> (B, S, heads, d)."""
    # Autocast casts what the positions' fp32 has widened.
    query, key = query.to(value.dtype), key.to(value.dtype)
    repeats = query.shape[1] // key.shape[1]
    key, value = (
        tensor.repeat_interleave(repeats, dim=1) if repeats > 1 else tensor for tensor in (key, value)
    )
    bias = None
    if attention_mask is not None:
        bias = torch.zeros_like(attention_mask, dtype=query.dtype).expand(-1, query.shape[1], -1, -1)
    output = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, bias is None, scale=scaling
    )[0]
    return output.transpose(1, 2), None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """(B, 1, S, S) bool; whether the batch has padding, which its values would tell, is not asked."""
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})


AttentionInterface.register(_FUSED, _fused_attention)
AttentionMaskInterface.register(_FUSED, _mask)
