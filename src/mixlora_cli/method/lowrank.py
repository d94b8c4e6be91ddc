"""The low-rank update of a linear layer, without ever forming the (d_out, d_in) matrix."""

from __future__ import annotations

import torch
from torch import Tensor


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
        weight: (B, r) straight-through weights of the pairs, or None.

    Returns:
        Shape and type of `output`.
    """
    dtype = output.dtype
    tokens = hidden.to(dtype).reshape(len(rows_a), -1, hidden.shape[-1])
    # (B, S, r): the one operand small enough that weighting it costs nothing.
    inner = torch.bmm(tokens, rows_a.to(dtype).transpose(1, 2))
    if weight is not None:
        inner = inner * weight.to(dtype).unsqueeze(1)
    # alpha multiplies inside the product; the sum with the base output is its accumulator.
    base = output.reshape(len(rows_b), -1, output.shape[-1])
    return torch.baddbmm(base, inner, rows_b.to(dtype), alpha=scaling).reshape(output.shape)
