"""Rows that hold several instances one behind the other (packing, padding-free batches): which token is whose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The instance of each token of a batch whose rows hold several."""

    ids: Tensor
    """(B, S) int64, from 0 on, never falling from row to row and within one."""
    count: int
    """N, instances in the batch."""


def find_segments(
    inputs: Mapping[str, Any], mask: Tensor | None, tokens: Tensor | None, shape: tuple[int, int]
) -> Segments | None:
    """Segments of a pass, from all that tells its attention where an instance ends; None where a row is an instance.

    Args:
        inputs: the model's arguments by name: `cu_seq_lens_q` (flash attention), `seq_idx` (state-space layers),
            `position_ids`, which start again with each instance.
        mask: its attention mask; one of queries and keys that hides a token from the next parts instances, and so does
            one that numbers them (1, 1, 2, 2, 0).
        tokens: (B, S) bool, False at padding, or None.
        shape: (B, S).
    """
    found = [starts for starts in _starts(inputs, mask, shape) if starts is not None]
    if not found:
        return None
    starts = torch.stack([each.expand(shape).to(found[0].device) for each in found]).any(dim=0)
    if tokens is not None:
        # What stands in the place of positions at padding means nothing.
        starts[:, 1:] &= (tokens[:, 1:] & tokens[:, :-1]).to(starts.device)
    if not bool(starts.any()):
        return None
    starts[:, 0] = True
    ids = starts.flatten().cumsum(0).view(shape) - 1
    return Segments(ids, int(ids[-1, -1]) + 1)


def _starts(
    inputs: Mapping[str, Any], mask: Tensor | None, shape: tuple[int, int]
) -> Iterator[Tensor | None]:
    """(B or 1, S) bool, True where an instance begins within a row, by each of the arguments that could say so."""
    rows, length = shape
    ends, labels, positions = (inputs.get(name) for name in ("cu_seq_lens_q", "seq_idx", "position_ids"))
    if isinstance(ends, Tensor) and rows == 1:
        inner = ends[(ends > 0) & (ends < length)].long()
        yield torch.zeros(shape, dtype=torch.bool, device=ends.device).index_fill(1, inner, True)
    if isinstance(labels, Tensor) and tuple(labels.shape) == shape:
        yield _behind(labels[:, 1:] != labels[:, :-1])
    if isinstance(positions, Tensor) and positions.shape[-1] == length and positions.dim() in (2, 3):
        # Of several kinds of positions (multimodal RoPE) the first is the text's, if there are four, else time, in
        # which all tokens of a picture are at once.
        text = positions if positions.dim() == 2 else positions[0]
        step = text[:, 1:] - text[:, :-1]
        if positions.dim() == 3 and len(positions) == 3:
            yield _behind(step < 0)
        else:
            # Without a mask transformers parts attention at every step that is not one.
            yield _behind(step != 1 if mask is None else step <= 0)
    if mask is not None and mask.dim() > 2:
        own = visible(mask, 0, length)
        yield _behind(own[:, 1:] & own[:, :-1] & ~visible(mask, -1, length - 1))
    elif (
        mask is not None
        and tuple(mask.shape) == shape
        and mask.dtype != torch.bool
        and not torch.compiler.is_compiling()  # what a mask holds cannot decide how a graph goes on
    ):
        yield _behind(mask[:, 1:] != mask[:, :-1])


def _behind(starts: Tensor) -> Tensor:
    """(B, S - 1) of all tokens but the first -> (B, S)."""
    return torch.cat([starts.new_zeros(len(starts), 1), starts], dim=1)


def visible(mask: Tensor, offset: int, length: int) -> Tensor:
    """Whether each query may look `offset` keys further: mask (B, [heads,] queries, keys) -> (B, length) bool.

    The mask holds True, or 0 where it is added to scores.
    """
    seen = mask[:, 0] if mask.dim() == 4 else mask
    diagonal = seen.diagonal(offset, dim1=-2, dim2=-1)[:, :length]
    return diagonal == 0 if diagonal.is_floating_point() else diagonal.bool()
