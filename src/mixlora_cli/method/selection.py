"""Which factors an instance gets: the paper's equations 5 to 8 as functions of tensors.

Sizes: B instances, S tokens, d_in input features, E factors in a pool, r of them selected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """The factors of one layer for B instances; the k-th of A works with the k-th of B (Eq. 9)."""

    index_a: Tensor
    """(B, r) int64, best first."""
    index_b: Tensor
    """(B, r) int64, best first."""
    weight: Tensor | None = None
    """(B, r) ones that carry the routers' gradient, or None where they get none."""

    def without_gradient(self) -> Selection:
        """The same choice, holding no graph."""
        return Selection(self.index_a.detach(), self.index_b.detach())


def masked_mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Average over an instance's own tokens (Eq. 5), accumulated in fp32.

    Args:
        hidden: (B, S, d).
        mask: (B, S) bool, True where a token counts; None counts all.

    Returns:
        (B, d) fp32; zero for an instance without any token.
    """
    if mask is None:
        return hidden.mean(dim=1, dtype=torch.float32)
    counted = mask.to(hidden.device)
    total = (hidden * counted.unsqueeze(-1).to(hidden.dtype)).sum(dim=1, dtype=torch.float32)
    return total / counted.sum(dim=1, keepdim=True).clamp(min=1)


def independent_probabilities(logits: Tensor) -> Tensor:
    """softmax(W R_IFS(h)) of Eq. 6: logits (B, E) -> probabilities (B, E)."""
    return logits.softmax(dim=-1)


def conditional_logits(rows_a: Tensor, weight: Tensor) -> Tensor:
    """A[i] W_AB[i] of Eq. 7: rows_a (B, r, d_in) in order of selection, weight (r, d_in, E) -> (B, r, E)."""
    return torch.einsum("brd,rde->bre", rows_a, weight)


def conditional_logits_released(rows_a: Tensor, weight: Tensor) -> Tensor:
    """What the published code has for Eq. 7: (sum_d A[i]) (sum_d W_AB[i]); shapes as in `conditional_logits`."""
    return rows_a.sum(dim=-1, keepdim=True) * weight.sum(dim=1)


def conditional_scores(logits: Tensor) -> Tensor:
    """R_CFS(A) = sum_i softmax(logits_i) of Eq. 7: (B, r, E) -> (B, E), each row sums to r."""
    return logits.softmax(dim=-1).sum(dim=1)


def fused_probabilities(independent: Tensor, scores: Tensor) -> Tensor:
    """p_IFS + p_CFS of Eq. 8, where p_CFS = softmax(R_CFS): softmax of a sum of softmaxes.

    Args:
        independent: p_IFS (B, E).
        scores: R_CFS (B, E).
    """
    return independent + scores.softmax(dim=-1)


def top_factors(probabilities: Tensor, rank: int) -> Tensor:
    """top_r of Eq. 6 and 8: (B, E) -> indices (B, r), most probable first."""
    return probabilities.topk(rank, dim=-1).indices


def random_factors(num_instances: int, num_factors: int, rank: int, device: torch.device) -> Tensor:
    """(num_instances, rank) distinct indices, uniform over all ordered choices.

    Drawn from torch's generator of the device: a seed repeats it, and so does gradient checkpointing, which restores
    that generator before it computes a layer again.
    """
    return torch.rand(num_instances, num_factors, device=device).topk(rank, dim=-1).indices


def straight_through_weight(probabilities: Tensor, index: Tensor) -> Tensor:
    """1 + p - stop_gradient(p) of the selected factors: (B, E), (B, r) -> (B, r), exactly one.

    The selection of Eq. 6 is 0/1 and passes no gradient; this passes the one that weights by probability would.
    """
    chosen = probabilities.gather(-1, index)
    return 1 + (chosen - chosen.detach())
