"""The mean of an instance's own tokens (Eq. 5), read once and never copied.

Padding and neighbours must not reach an instance's mean, not even through the order of a floating-point sum. On the CPU
each instance is therefore summed by itself, one stretch of counted tokens after another; that is also the cheapest way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora_cli.method.packing import Segments


@dataclass(frozen=True)
class TokenRanges:
    """Where each instance's counted tokens are in the flattened batch (B * S,)."""

    ranges: tuple[tuple[tuple[int, int], ...], ...]
    """By instance its stretches without a gap: the first token and the one behind the last."""
    tokens: Tensor
    """Indices of all counted tokens, instance by instance."""
    starts: Tensor
    """(N,) where each instance begins in `tokens`."""


_STRETCHES = 16
"""On average of an instance; a conversation has two for each turn with a picture."""


def masked_mean(
    hidden: Tensor, mask: Tensor | None, ranges: TokenRanges | None = None, segments: Segments | None = None
) -> Tensor:
    """Average over an instance's own tokens, accumulated in fp32.

    Args:
        hidden: (B, S, d).
        mask: (B, S) bool, True where a token counts; None counts all.
        ranges: `token_ranges` of the same mask and segments, if known; saves finding them again for every layer.
        segments: whose token each is, where rows hold several instances; None = a row is an instance.

    Returns:
        (N, d) fp32, N = B without segments; zero for an instance without any token.
    """
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return _mean_by_mask(hidden, mask, segments)
    if ranges is None:
        counted = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
        ranges = token_ranges(counted, segments)
    if ranges is None:
        return _mean_by_mask(hidden, mask, segments)
    if hidden.requires_grad and torch.is_grad_enabled():
        mean: Tensor = _MeanOfRanges.apply(hidden, ranges)  # type: ignore[no-untyped-call]
        return mean
    return _mean_of_ranges(hidden, ranges)


def token_ranges(mask: Tensor, segments: Segments | None = None) -> TokenRanges | None:
    """Each instance's counted stretches of mask (B, S); None where they are so many that a mask is cheaper."""
    # In numpy, whose small operations are quicker than torch's; a batch needs a dozen of them.
    rows, length = mask.shape
    tokens = np.flatnonzero(mask.numpy())
    whose, count = tokens // length, rows
    if segments is not None:
        whose, count = segments.ids.numpy().ravel()[tokens], segments.count
        order = np.argsort(whose, kind="stable")
        tokens, whose = tokens[order], whose[order]
    begins = np.flatnonzero((np.diff(tokens, prepend=-2) != 1) | (np.diff(whose, prepend=-1) != 0))
    if len(begins) > _STRETCHES * count:
        return None
    ends = np.append(begins[1:], len(tokens))[: len(begins)] - 1
    found: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    stretches = whose[begins], tokens[begins], tokens[ends] + 1
    for instance, first, last in zip(*(each.tolist() for each in stretches), strict=True):
        found[instance].append((first, last))
    starts = np.searchsorted(whose, np.arange(count))
    return TokenRanges(tuple(map(tuple, found)), torch.from_numpy(tokens), torch.from_numpy(starts))


def _mean_by_mask(hidden: Tensor, mask: Tensor | None, segments: Segments | None) -> Tensor:
    if segments is not None:
        return _mean_by_segment(hidden, mask, segments)
    if mask is None:
        return hidden.mean(dim=1, dtype=torch.float32)
    counted = mask.to(hidden.device)
    total = (hidden * counted.unsqueeze(-1).to(hidden.dtype)).sum(dim=1, dtype=torch.float32)
    return total / counted.sum(dim=1, keepdim=True).clamp(min=1)


def _mean_by_segment(hidden: Tensor, mask: Tensor | None, segments: Segments) -> Tensor:
    ids = segments.ids.to(hidden.device).flatten()
    counted = hidden.new_ones(len(ids)) if mask is None else mask.to(hidden.device, hidden.dtype).flatten()
    tokens = (hidden.flatten(0, 1) * counted.unsqueeze(-1)).float()
    total = tokens.new_zeros(segments.count, hidden.shape[-1]).index_add(0, ids, tokens)
    sizes = tokens.new_zeros(segments.count).index_add(0, ids, counted.float())
    return total / sizes.clamp(min=1).unsqueeze(1)


def _mean_of_ranges(hidden: Tensor, found: TokenRanges) -> Tensor:
    flat = hidden.detach().flatten(0, 1)
    if hidden.dtype == torch.float32:
        # An instance is a bag of its tokens, added up one after the other: one call for the whole batch.
        return F.embedding_bag(found.tokens, flat, found.starts, mode="mean")
    means = flat.new_empty(len(found.ranges), flat.shape[-1], dtype=torch.float32)
    for mean, stretches in zip(means.unbind(0), found.ranges, strict=True):
        mean.zero_()
        for first, last in stretches:
            mean += torch.sum(flat[first:last], dim=0, dtype=torch.float32)
        mean.div_(_size(stretches))
    return means


def _size(stretches: tuple[tuple[int, int], ...]) -> int:
    return max(sum(last - first for first, last in stretches), 1)


class _MeanOfRanges(torch.autograd.Function):
    """Backwards one pass over the input's gradient, and nothing of the input is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, found: TokenRanges) -> Tensor:
        ctx.ranges, ctx.shape, ctx.dtype = found.ranges, hidden.shape, hidden.dtype
        return _mean_of_ranges(hidden, found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        for_hidden = gradient.new_zeros(ctx.shape, dtype=ctx.dtype)
        flat = for_hidden.view(-1, ctx.shape[-1])
        for mean, stretches in zip(gradient, ctx.ranges, strict=True):
            for first, last in stretches:
                flat[first:last] = mean / _size(stretches)
        return for_hidden, None
