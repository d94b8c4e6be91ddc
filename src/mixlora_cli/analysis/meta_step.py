"""What a training step computes and keeps, measured on torch's meta device: tensors with shapes and no memory.

One forward and backward pass of the decoder with one layer, and with two; what the second adds, each further one of its
kind adds. The vision side is measured apart, on a picture. Kernels are those of a GPU: fused attention is the
memory-efficient one, a dropout mask has a byte a number, autocast casts what it would cast there.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutput

from mixlora_cli.analysis.bench.counters import Operations, count_operations, saved_bytes
from mixlora_cli.analysis.bench.layers import into_published_form
from mixlora_cli.analysis.meta_picture import META, Picture, picture_inputs, read_picture
from mixlora_cli.config import TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.models.forward import inputs_keep_their_dtype
from mixlora_cli.models.load import auto_class, first_line
from mixlora_cli.models.skeleton import attach_to_skeleton
from mixlora_cli.routers import ROUTERS

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

    @property
    def picture(self) -> Picture | None:
        """What a picture is to the model; None for a model that reads none, and where nobody knows: see `unseen`."""
        return None if isinstance(self._picture, str) else self._picture

    @property
    def unseen(self) -> str | None:
        """Why the vision side cannot be measured; None where it can, or there is none."""
        return self._picture if isinstance(self._picture, str) else None

    @cached_property
    def _picture(self) -> Picture | str | None:
        config: Any = self.skeleton.config
        if auto_class(config, self.config.model.name) is not AutoModelForImageTextToText:
            return None
        adapted = self._adapted(copy.deepcopy(self.skeleton))
        base: Any = adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted
        try:
            inputs, tokens = picture_inputs(self.config.model, config)
            with _autocast_on_meta():
                return read_picture(base, inputs, tokens)
        except UserError:
            raise
        except Exception as error:  # code that wants to see a tensor's numbers raises what it likes
            return first_line(error)

    def operations(self, length: int, labels: int, published: bool = False) -> StepOperations:
        """Operations of one instance, as configured.

        Args:
            length: tokens, image tokens and padding included.
            labels: tokens that carry loss; the head works on these alone.
            published: with MixLoRA's layers as the code published with the paper computes them: it forms the matrix
                (d_in, d_out) of every instance and multiplies every token with it.
        """

        checkpointing = self.config.train.gradient_checkpointing
        head: Any = self.skeleton.get_output_embeddings()
        gradient = torch.empty(1, labels, head.out_features, device=META)

        def counted(layers: tuple[int, ...]) -> tuple[float, float, float]:
            model = self._built(layers)
            if published:
                with META:
                    into_published_form(model)
            inputs = self._inputs(model, 1, length, checkpointing)

            def run() -> Operations:
                with _autocast_on_meta():
                    return count_operations(
                        lambda: model(**inputs, logits_to_keep=labels, use_cache=False).logits, gradient
                    )

            done, again = run(), 0
            if (
                checkpointing and published
            ):  # torch's older kind of checkpointing, which computes everything again
                again = done.forward - 2 * labels * head.weight.numel()
            elif checkpointing:
                _checkpoint(model)
                again = run().backward - done.backward
            return done.forward, done.backward, again

        (forward, backward, recomputation), _ = self._extended(counted)
        vision = 0.0
        if self.picture is not None:
            cached = self.config.train.cache_features and self.picture.cacheable
            vision = self.picture.operations.total - (self.picture.tower if cached else 0)
        return StepOperations(forward, backward, recomputation, vision)

    def kept_bytes(
        self, instances: int, length: int, element: int, checkpointing: bool
    ) -> tuple[float, float]:
        """Bytes that a forward pass keeps for its backward pass: of all layers, and of the largest; logits left out.

        Args:
            instances: of the batch.
            length: tokens of each.
            element: bytes of an activation: 2 for bf16, 4 for fp32.
            checkpointing: with gradient checkpointing.
        """

        def kept(layers: tuple[int, ...]) -> tuple[float]:
            model = self._built(layers, bf16=element == 2)
            if checkpointing:
                _checkpoint(model)
            inputs = self._inputs(model, instances, length, checkpointing)
            with _autocast_on_meta(), inputs_keep_their_dtype(model), _AsOnGpu(bf16=element == 2) as gpu:
                kept = saved_bytes(
                    lambda: model(**inputs, logits_to_keep=1, use_cache=False), model, gpu.copies.values()
                )
            return (kept,)

        (whole,), (layer,) = self._extended(kept)
        return whole, layer

    def _extended(
        self, measure: Callable[[tuple[int, ...]], tuple[float, ...]]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of the whole decoder, and of the largest of its layers.

        Args:
            measure: what a decoder with these layers needs, given by their numbers in the whole one.

        Raises:
            UserError: a layer cannot be run without weights.
        """
        kinds = _layer_kinds(self.skeleton.config.get_text_config())
        further = Counter(kinds)
        further[kinds[0]] -= 1
        try:
            first = measure((0,))
            second = {kind: measure((0, kinds.index(kind))) for kind in further}
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"model={self.config.model.name}: the layers of {type(self.skeleton).__name__} cannot be measured "
                f"without weights: {first_line(error)}"
            ) from error
        more = {kind: [two - one for one, two in zip(first, second[kind], strict=True)] for kind in further}
        whole = [
            one + sum(count * more[kind][at] for kind, count in further.items())
            for at, one in enumerate(first)
        ]
        return tuple(whole), tuple(map(max, zip(*more.values(), strict=True)))

    def _built(self, layers: tuple[int, ...], bf16: bool = False) -> nn.Module:
        model: Any = self._base(layers)
        if bf16 and self.config.adapter.name != "full":
            model = model.to(torch.bfloat16)
        built: nn.Module = self._adapted(model).train()
        return built

    def _adapted(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        config = self.config
        return attach_to_skeleton(
            model,
            config.adapter,
            config.routing,
            config.rank,
            config.factors,
            config.model.train_also,
        )

    def _base(self, layers: tuple[int, ...]) -> PreTrainedModel:
        """The model with these layers of its decoder, whose forward pass is its decoder's and its output layer's."""
        config = copy.deepcopy(self.skeleton.config)
        text = config.get_text_config()
        for name, values in _lists_by_layer(text).items():
            setattr(text, name, [values[layer] for layer in layers])
        text.num_hidden_layers = len(layers)
        config._attn_implementation = "eager" if self.config.model.attn_implementation == "eager" else _FUSED
        with META:
            model = type(self.skeleton)(config)
        vars(model)["forward"] = partial(_read_text, model)
        return model

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
        if self.config.adapter.name == "mixlora":
            inputs["prompt_mask"] = inputs["attention_mask"]
        if self.config.adapter.name == "mixlora" and ROUTERS[self.config.routing.name].source == "task":
            inputs["task_embeddings"] = torch.empty(instances, embeddings.shape[1], device=META)
        return inputs


def _read_text(
    model: PreTrainedModel,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    use_cache: bool,
) -> CausalLMOutput:
    """What every model does with the embeddings of text and pictures, however it finds places for the pictures."""
    head: Any = model.get_output_embeddings()
    decoder: Any = model.get_decoder()
    if decoder is head or (
        isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None
    ):
        decoder = decoder.base_model if decoder is not head else model.base_model
    output = decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=use_cache)
    return CausalLMOutput(logits=head(output.last_hidden_state[:, -logits_to_keep:]))


def _lists_by_layer(text: Any) -> dict[str, list[Any]]:
    """Settings that a configuration gives for each layer, such as `layer_types`."""
    lists = {
        name: values for name, values in vars(text).items() if "layer" in name and isinstance(values, list)
    }
    return {name: values for name, values in lists.items() if len(values) == text.num_hidden_layers}


def _layer_kinds(text: Any) -> list[tuple[Any, ...]]:
    """By layer: what its configuration says of it alone; layers that are alike have the same."""
    lists = _lists_by_layer(text).values()
    return [tuple(values[layer] for values in lists) for layer in range(text.num_hidden_layers)]


def _checkpoint(model: Any) -> None:
    """Switch gradient checkpointing on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable`", FutureWarning)  # its name in 5.0
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


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
