"""W h + (alpha / r) B A h with each instance's own A and B, without ever forming the (d_out, d_in) matrix.

Beside the two thin products, the update costs one pass over the output forwards (they are added into it where it
lies) and one over the input's gradient backwards. What is kept for the backward pass is the input and the r numbers a
token in between, as for LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mixlora_cli.method.dropout import dropped_places, dropped_share, zero_
from mixlora_cli.method.selection import Selection


def add_low_rank(
    output: Tensor,
    hidden: Tensor,
    rows_a: Tensor,
    rows_b: Tensor,
    scaling: float,
    weight: Tensor | None = None,
) -> Tensor:
    """Add scaling * B A h (Eq. 9) to W h, with A and B of each instance: r (d_in + d_out) products a token.

    Everything is computed in the type of `output`, so fp32 factors never drag a bf16 layer to fp32.

    Args:
        output: W h of the frozen layer (B, ..., d_out), or (B, d_out) where an instance is a single row.
        hidden: input of the low-rank product (B, ..., d_in), or (B, d_in).
        rows_a: selected factors of A (B, r, d_in).
        rows_b: selected factors of B (B, r, d_out).
        scaling: alpha / r.
        weight: (B, r) what each pair counts (`Selection.weight`), or None.

    Returns:
        Shape and type of `output`, which stays as it is.
    """
    dtype = output.dtype
    hidden, rows_a, rows_b = hidden.to(dtype), rows_a.to(dtype), rows_b.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _sum(output, _weighted(_inner(hidden, rows_a), weight), rows_b, scaling)
    added: Tensor = _AddLowRank.apply(  # type: ignore[no-untyped-call]
        output, hidden, rows_a, rows_b, weight, scaling
    )
    return added


def adapted_linear(
    base: nn.Linear,
    hidden: Tensor,
    pool_a: Tensor,
    pool_b: Tensor,
    selection: Selection,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """W h + bias + scaling * B A h in one step where `is_plain(base)`: neither way keeps a second output or gradient.

    Args:
        base: the frozen layer.
        hidden: its input (B, ..., d_in).
        pool_a: factors of A (E, d_in).
        pool_b: factors of B (E, d_out).
        selection: each instance's own factors of both.
        scaling: alpha / r.
        dropout: probability on the input of the low-rank product.

    Returns:
        (B, ..., d_out) in the type of `hidden`.
    """
    output: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
        hidden,
        dropped_places(hidden, dropout) if dropout else None,
        base.weight,
        base.bias,
        pool_a,
        pool_b,
        None if selection.weight is None else selection.weight.to(hidden.dtype),
        (selection.index_a, selection.index_b),
        scaling / (1 - dropped_share(hidden.numel(), dropout)),
    )
    return output


def adapted_linear_of_rows(
    base: nn.Linear,
    hidden: Tensor,
    rows_a: Tensor,
    rows_b: Tensor,
    scaling: float,
) -> Tensor:
    """`adapted_linear` without gradients or dropout, of factors (B, r, d_in) and (B, r, d_out) looked up before."""
    output = F.linear(hidden, base.weight, base.bias)
    return _add_into(output, _inner(hidden, rows_a.to(output.dtype)), rows_b.to(output.dtype), scaling)


def add_low_rank_by_token(
    output: Tensor,
    hidden: Tensor,
    pool_a: Tensor,
    pool_b: Tensor,
    selection: Selection,
    instance: Tensor,
    scaling: float,
) -> Tensor:
    """`add_low_rank` where rows hold several instances: all E inner products, of which each token takes its own r.

    E (d_in + d_out) products a token in the place of r (d_in + d_out), but no factors are copied for the tokens, and
    instances may lie anyhow.

    Args:
        output: W h of the frozen layer (B, ..., d_out).
        hidden: input of the low-rank product (B, ..., d_in), with as many tokens.
        pool_a: factors of A (E, d_in).
        pool_b: factors of B (E, d_out).
        selection: of each of the N instances.
        instance: (B, S) int64, whose token each is.
        scaling: alpha / r.
    """
    dtype = output.dtype
    tokens = instance.to(hidden.device).view(output.shape[:-1])
    inner = F.linear(hidden.to(dtype), pool_a.to(dtype)).gather(-1, selection.index_a[tokens])
    if selection.weight is not None:
        inner = inner * selection.weight.to(dtype)[tokens]
    spread = inner.new_zeros(*inner.shape[:-1], len(pool_b)).scatter(-1, selection.index_b[tokens], inner)
    return output + scaling * spread.matmul(pool_b.to(dtype))


def is_plain(base: nn.Module, hidden: Tensor) -> bool:
    """Whether the base layer is nothing but its frozen weight, so that its product can be taken without calling it.

    Sharded (ZeRO-3, FSDP), offloaded, quantised or watched layers have to be called; so have layers whose types
    autocast chooses, and all under `torch.compile`, which fuses by itself.
    """
    if torch.compiler.is_compiling() or not is_unwatched(base, nn.Linear):
        return False
    weight, bias = base.weight, base.bias
    return (
        not weight.requires_grad
        and weight.dtype == hidden.dtype
        and (bias is None or not bias.requires_grad)
        and not _autocast_to_another_type(hidden)
    )


def is_unwatched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module of just this kind can stand aside: nobody waits for its call, to see it or bring its weight."""
    if type(module) is not kind:
        return False
    own = vars(module)  # a module's own look-up of attributes takes several times as long
    weight = own["_parameters"].get("weight")
    return (
        type(weight) is nn.Parameter
        and not hasattr(weight, "ds_id")
        and "forward" not in own
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"])
    )


def _autocast_to_another_type(hidden: Tensor) -> bool:
    kind = hidden.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != hidden.dtype


def _by_instance(tokens: Tensor, num_instances: int) -> Tensor:
    """(B, ..., d) -> (B, S, d)."""
    return tokens.reshape(num_instances, -1, tokens.shape[-1])


def _inner(hidden: Tensor, rows_a: Tensor) -> Tensor:
    """A h: (B, S, r)."""
    return torch.bmm(_by_instance(hidden, len(rows_a)), rows_a.transpose(1, 2))


def _weighted(inner: Tensor, weight: Tensor | None) -> Tensor:
    """The weights of the pairs (B, r) on the one operand so small that it costs nothing."""
    return inner if weight is None else inner * weight.unsqueeze(1)


def _sum(output: Tensor, inner: Tensor, rows_b: Tensor, scaling: float) -> Tensor:
    """A new tensor W h + scaling * B (A h): the scale multiplies inside the product, W h is its accumulator."""
    return torch.baddbmm(_by_instance(output, len(rows_b)), inner, rows_b, alpha=scaling).reshape(
        output.shape
    )


def _add_into(output: Tensor, inner: Tensor, rows_b: Tensor, scaling: float) -> Tensor:
    """`_sum` written over `output`, which must be the caller's to change."""
    output.view(len(rows_b), -1, output.shape[-1]).baddbmm_(inner, rows_b, alpha=scaling)
    return output


@dataclass
class _Gradients:
    """Of the low-rank product's input (B, S, d_in), of A's and B's rows (B, r, d), of the pairs' weights (B, r)."""

    hidden: Tensor | None
    rows_a: Tensor
    rows_b: Tensor
    weight: Tensor | None


def _backward(
    gradient: Tensor,
    hidden: Tensor,
    rows_a: Tensor,
    rows_b: Tensor,
    inner: Tensor,
    weight: Tensor | None,
    scaling: float,
    wants_hidden: bool,
    into_hidden: Tensor | None = None,
) -> _Gradients:
    """Gradients of scaling * B A h, given the output's (B, ..., d_out).

    `into_hidden` is the input's gradient so far, to be added to where it lies; without it a new tensor is made. In the
    products the long dimension stays innermost: (r, S) x (S, d), never (d, S) x (S, r), which is several times slower.
    """
    rows = _by_instance(gradient, len(rows_b))
    by_pair = torch.bmm(rows, rows_b.transpose(1, 2)).mul_(scaling)
    to_inner = _weighted(by_pair, weight)
    for_hidden = None
    if into_hidden is not None:
        into_hidden.view(len(rows_a), -1, into_hidden.shape[-1]).baddbmm_(to_inner, rows_a)
    elif wants_hidden:
        for_hidden = torch.bmm(to_inner, rows_a).reshape(hidden.shape)
    return _Gradients(
        for_hidden,
        torch.bmm(to_inner.transpose(1, 2), _by_instance(hidden, len(rows_a))),
        torch.bmm((_weighted(inner, weight) * scaling).transpose(1, 2), rows),
        None if weight is None else (by_pair * inner).sum(dim=1),
    )


def _for_pool(for_rows: Tensor, index: Tensor, pool: Tensor) -> Tensor:
    """Gradient of a pool (E, d) out of its rows' (B, r, d); factors that nobody selected get zero."""
    summed: Tensor = torch.ops.aten.embedding_dense_backward(
        for_rows.to(pool.dtype), index, len(pool), -1, False
    )
    return summed


class _AddLowRank(torch.autograd.Function):
    """`add_low_rank` behind a base layer that was called: its own backward is its own business."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        hidden: Tensor,
        rows_a: Tensor,
        rows_b: Tensor,
        weight: Tensor | None,
        scaling: float,
    ) -> Tensor:
        inner = _inner(hidden, rows_a)
        ctx.save_for_backward(hidden, rows_a, rows_b, inner, weight)
        ctx.scaling = scaling
        return _sum(output, _weighted(inner, weight), rows_b, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, rows_a, rows_b, inner, weight = ctx.saved_tensors
        wants_hidden = ctx.needs_input_grad[1]
        found = _backward(gradient, hidden, rows_a, rows_b, inner, weight, ctx.scaling, wants_hidden)
        return gradient, found.hidden, found.rows_a, found.rows_b, found.weight, None


class _AdaptedLinear(torch.autograd.Function):
    """`adapted_linear`: the base layer's product and its gradient are the accumulators of the low-rank ones.

    The selected rows are looked up again for the backward pass: kept for every layer they would add up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        dropped: Tensor | None,
        base_weight: Tensor,
        base_bias: Tensor | None,
        pool_a: Tensor,
        pool_b: Tensor,
        weight: Tensor | None,
        index: tuple[Tensor, Tensor],
        scaling: float,
    ) -> Tensor:
        thinned = _thinned(hidden, dropped)
        inner = _inner(thinned, F.embedding(index[0], pool_a).to(hidden.dtype))
        output = F.linear(hidden, base_weight, base_bias)
        # The input, which other layers keep too, and which of its numbers are dropped; never a thinned copy.
        ctx.save_for_backward(thinned, dropped, inner, weight, *index, pool_a, pool_b, base_weight)
        ctx.scaling = scaling
        rows_b = F.embedding(index[1], pool_b).to(output.dtype)
        return _add_into(output, _weighted(inner, weight), rows_b, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacked once: under checkpointing that is what computes them again.
        thinned, dropped, inner, weight, index_a, index_b, pool_a, pool_b, base_weight = ctx.saved_tensors
        for_hidden = gradient.matmul(base_weight) if ctx.needs_input_grad[0] else None
        found = _backward(
            gradient,
            thinned,
            F.embedding(index_a, pool_a).to(gradient.dtype),
            F.embedding(index_b, pool_b).to(gradient.dtype),
            inner,
            weight,
            ctx.scaling,
            wants_hidden=dropped is not None and for_hidden is not None,
            into_hidden=for_hidden if dropped is None else None,
        )
        if found.hidden is not None and for_hidden is not None:
            for_hidden += zero_(found.hidden, dropped)
        for_a, for_b = _for_pool(found.rows_a, index_a, pool_a), _for_pool(found.rows_b, index_b, pool_b)
        return for_hidden, None, None, None, for_a, for_b, found.weight, None, None


def _thinned(hidden: Tensor, dropped: Tensor | None) -> Tensor:
    """The low-rank product's input: dropped numbers are zero; the scale of the others rides on alpha / r."""
    return hidden if dropped is None else zero_(hidden.clone(memory_format=torch.contiguous_format), dropped)
