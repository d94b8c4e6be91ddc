"""The mean of an instance's own tokens (Eq. 5).

Padding and neighbours must not reach an instance's mean, not even through the order of a floating-point sum. On the CPU
each instance is therefore summed by itself, one counted token after another; that is also the cheapest way.
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
class OwnTokens:
    """Which tokens of the flattened batch (B * S,) count, instance by instance."""

    tokens: Tensor
    """Indices of all that count, in the order of the N instances."""
    starts: Tensor
    """(N,) where each instance begins in `tokens`."""


def masked_mean(
    hidden: Tensor, mask: Tensor | None, own: OwnTokens | None = None, segments: Segments | None = None
) -> Tensor:
    """Average over an instance's own tokens, accumulated in fp32.

    Args:
        hidden: (B, S, d).
        mask: (B, S) bool, True where a token counts; None counts all.
        own: `own_tokens` of the same mask and segments, if known; saves finding them again for every layer.
        segments: whose token each is, where rows hold several instances; None = a row is an instance.

    Returns:
        (N, d) fp32, N = B without segments; zero for an instance without any token.
    """
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return _mean_by_mask(hidden, mask, segments)
    if own is None:
        own = own_tokens(torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask, segments)
    if hidden.requires_grad and torch.is_grad_enabled():
        mean: Tensor = _MeanOfOwn.apply(hidden, own)  # type: ignore[no-untyped-call]
        return mean
    return _mean_of_own(hidden, own)


def own_tokens(mask: Tensor, segments: Segments | None = None) -> OwnTokens:
    """Each instance's counted tokens of mask (B, S)."""
    # In numpy, whose small operations are quicker than torch's.
    rows, length = mask.shape
    tokens = np.flatnonzero(mask.numpy())
    whose, count = tokens // length, rows
    if segments is not None:
        whose, count = segments.ids.numpy().ravel()[tokens], segments.count
        order = np.argsort(whose, kind="stable")
        tokens, whose = tokens[order], whose[order]
    starts = np.searchsorted(whose, np.arange(count))
    return OwnTokens(torch.from_numpy(tokens), torch.from_numpy(starts))


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


def _mean_of_own(hidden: Tensor, own: OwnTokens) -> Tensor:
    # An instance is a bag of its tokens, added up one after the other: one call for the whole batch.
    return F.embedding_bag(own.tokens, hidden.detach().flatten(0, 1).float(), own.starts, mode="mean")


class _MeanOfOwn(torch.autograd.Function):
    """Backwards one pass over the input's gradient, and nothing of the input is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, own: OwnTokens) -> Tensor:
        ctx.own, ctx.shape, ctx.dtype = own, hidden.shape, hidden.dtype
        return _mean_of_own(hidden, own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own: OwnTokens = ctx.own
        sizes = own.starts.diff(append=torch.tensor([len(own.tokens)]))
        of_token = (gradient / sizes.clamp(min=1).unsqueeze(1)).to(ctx.dtype).repeat_interleave(sizes, dim=0)
        for_hidden = gradient.new_zeros(ctx.shape, dtype=ctx.dtype)
        for_hidden.view(-1, ctx.shape[-1]).index_copy_(0, own.tokens, of_token)
        return for_hidden, None
