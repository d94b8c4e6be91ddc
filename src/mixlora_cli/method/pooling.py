"""The mean of an instance's own tokens (Eq. 5), read once and never copied.

Padding and neighbours must not reach an instance's mean, not even through the order of a floating-point sum. On the CPU
each row is therefore summed by itself, from its first counted token to its last; that is also the cheapest way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Spans = tuple[tuple[int, int], ...]
"""For each row the first counted token and the one behind the last, where all between them count."""


def masked_mean(hidden: Tensor, mask: Tensor | None, spans: Spans | None = None) -> Tensor:
    """Average over an instance's own tokens, accumulated in fp32.

    Args:
        hidden: (B, S, d).
        mask: (B, S) bool, True where a token counts; None counts all.
        spans: `contiguous_spans(mask)`, if known; saves finding them again for every layer.

    Returns:
        (B, d) fp32; zero for an instance without any token.
    """
    if mask is None:
        spans = ((0, hidden.shape[1]),) * len(hidden)
    elif spans is None and hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        spans = contiguous_spans(mask)
    if spans is None or hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return _mean_by_mask(hidden, mask)
    if hidden.requires_grad and torch.is_grad_enabled():
        mean: Tensor = _MeanOfSpans.apply(hidden, spans)  # type: ignore[no-untyped-call]
        return mean
    return _mean_of_spans(hidden, spans)


def contiguous_spans(mask: Tensor) -> Spans | None:
    """The rows' counted stretches of mask (B, S); None where one has a gap (a prompt of several turns)."""
    counted = mask.sum(dim=1)
    first = mask.int().argmax(dim=1)
    last = mask.shape[1] - mask.flip(1).int().argmax(dim=1)
    last = torch.where(counted > 0, last, first)
    if not torch.equal(last - first, counted):
        return None
    return tuple(zip(first.tolist(), last.tolist(), strict=True))


def _mean_by_mask(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return hidden.mean(dim=1, dtype=torch.float32)
    counted = mask.to(hidden.device)
    total = (hidden * counted.unsqueeze(-1).to(hidden.dtype)).sum(dim=1, dtype=torch.float32)
    return total / counted.sum(dim=1, keepdim=True).clamp(min=1)


def _mean_of_spans(hidden: Tensor, spans: Spans) -> Tensor:
    means = hidden.new_empty(len(hidden), hidden.shape[-1], dtype=torch.float32)
    for row, mean, (first, last) in zip(hidden.unbind(0), means.unbind(0), spans, strict=True):
        torch.sum(row[first:last], dim=0, dtype=torch.float32, out=mean)
        mean.div_(max(last - first, 1))
    return means


class _MeanOfSpans(torch.autograd.Function):
    """Backwards one pass over the input's gradient, and nothing of the input is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, spans: Spans) -> Tensor:
        ctx.spans, ctx.shape, ctx.dtype = spans, hidden.shape, hidden.dtype
        return _mean_of_spans(hidden, spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        for_hidden = gradient.new_zeros(ctx.shape, dtype=ctx.dtype)
        for row, mean, (first, last) in zip(for_hidden, gradient, ctx.spans, strict=True):
            row[first:last] = mean / max(last - first, 1)
        return for_hidden, None
