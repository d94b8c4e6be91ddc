"""The mean of an instance's own tokens (Eq. 5), read once and never copied.

Padding and neighbours must not reach an instance's mean, not even through the order of a floating-point sum. On the CPU
each row is therefore summed by itself, from its first counted token to its last; that is also the cheapest way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Spans:
    """Where each row's counted tokens are, if there is no gap between them."""

    rows: tuple[tuple[int, int], ...]
    """The first one and the one behind the last."""
    tokens: Tensor
    """Indices of all counted tokens in the flattened batch (B * S,), row by row."""
    starts: Tensor
    """(B,) where each row begins in `tokens`."""


def spans_of_rows(rows: Sequence[tuple[int, int]], length: int) -> Spans:
    """Spans of rows that are `length` tokens apart."""
    places = [torch.arange(i * length + first, i * length + last) for i, (first, last) in enumerate(rows)]
    sizes = torch.tensor([0, *(last - first for first, last in rows[:-1])])
    return Spans(tuple(rows), torch.cat(places), sizes.cumsum(0))


def masked_mean(hidden: Tensor, mask: Tensor | None, spans: Spans | None = None) -> Tensor:
    """Average over an instance's own tokens, accumulated in fp32.

    Args:
        hidden: (B, S, d).
        mask: (B, S) bool, True where a token counts; None counts all.
        spans: `contiguous_spans(mask)`, if known; saves finding them again for every layer.

    Returns:
        (B, d) fp32; zero for an instance without any token.
    """
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return _mean_by_mask(hidden, mask)
    if mask is None:
        spans = spans_of_rows([(0, hidden.shape[1])] * len(hidden), hidden.shape[1])
    elif spans is None:
        spans = contiguous_spans(mask)
    if spans is None:
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
    return spans_of_rows(list(zip(first.tolist(), last.tolist(), strict=True)), mask.shape[1])


def _mean_by_mask(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return hidden.mean(dim=1, dtype=torch.float32)
    counted = mask.to(hidden.device)
    total = (hidden * counted.unsqueeze(-1).to(hidden.dtype)).sum(dim=1, dtype=torch.float32)
    return total / counted.sum(dim=1, keepdim=True).clamp(min=1)


def _mean_of_spans(hidden: Tensor, spans: Spans) -> Tensor:
    if hidden.dtype == torch.float32:
        # A row is a bag of its tokens, added up one after the other: one call for the whole batch.
        return F.embedding_bag(spans.tokens, hidden.detach().flatten(0, 1), spans.starts, mode="mean")
    means = hidden.new_empty(len(hidden), hidden.shape[-1], dtype=torch.float32)
    for row, mean, (first, last) in zip(hidden.unbind(0), means.unbind(0), spans.rows, strict=True):
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
        for row, mean, (first, last) in zip(for_hidden, gradient, ctx.spans.rows, strict=True):
            row[first:last] = mean / max(last - first, 1)
        return for_hidden, None
