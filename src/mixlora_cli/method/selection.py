"""Which factors an instance gets: the paper's equations 5 to 8 as functions of tensors.

Sizes: B instances, S tokens, d_in input features, E factors in a pool, r of them selected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators") as signed 64-bit integers:
# its increment, and the multipliers of its output function.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


@dataclass(frozen=True)
class Selection:
    """The factors of one layer for B instances; the k-th of A works with the k-th of B (Eq. 9)."""

    index_a: Tensor
    """(B, r) int64, best first."""
    index_b: Tensor
    """(B, r) int64, best first."""
    weight: Tensor | None = None
    """(B, r) ones, by which the gradient of routers that learn comes back; None = they get none."""

    def without_gradient(self) -> Selection:
        """The same choice, holding no graph."""
        return self if self.weight is None else Selection(self.index_a, self.index_b)

    @classmethod
    def joined(cls, parts: Sequence[Selection]) -> Selection:
        """Those of several batches, one after the other, on the CPU."""
        index_a, index_b = (
            torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("index_a", "index_b")
        )
        return cls(index_a, index_b)

    def of(self, rows: Tensor) -> Selection:
        """That of some of the instances."""
        return Selection(self.index_a[rows], self.index_b[rows])


def independent_probabilities(logits: Tensor) -> Tensor:
    """softmax(W R_IFS(h)) of Eq. 6: logits (B, E) -> probabilities (B, E)."""
    return logits.softmax(dim=-1)


def conditional_logits(rows_a: Tensor, weight: Tensor) -> Tensor:
    """A[i] W_AB[i] of Eq. 7: rows_a (B, r, d_in) in order of selection, weight (r, d_in, E) -> (B, r, E)."""
    return torch.bmm(rows_a.transpose(0, 1), weight).transpose(0, 1)


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


def stream_of(name: str) -> int:
    """A number of 56 bits for a layer's name, so that layers draw independently from the same seeds."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def seeded_factors(seeds: Tensor, stream: int, num_factors: int, rank: int) -> Tensor:
    """As `random_factors`, but a row depends on its seed and `stream` alone: not on its neighbours, nor on the device.

    A row's E keys are the first E numbers of SplitMix64 started at seed XOR stream; they never tie.

    Args:
        seeds: (B,) int64, spread over the whole range as digests are.
        stream: which of many independent draws from the same seeds.
    """
    places = torch.arange(1, num_factors + 1, device=seeds.device)
    keys = (seeds ^ stream).unsqueeze(1) + places * _INCREMENT
    for shift, multiplier in _MULTIPLIERS:
        keys = (keys ^ _shifted_right(keys, shift)) * multiplier
    keys = keys ^ _shifted_right(keys, 31)
    return keys.topk(rank, dim=-1).indices


def _shifted_right(words: Tensor, bits: int) -> Tensor:
    """A shift that fills up with zeros; torch's own repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def load_balance(probabilities: Tensor, index: Tensor) -> Tensor:
    """E * sum_e f_e P_e (Fedus et al., 2022, Eq. 4): 1 where factors are used evenly, E / r where r do all.

    Args:
        probabilities: (B, E), each row sums to 1; P is their mean over the batch and carries the gradient.
        index: (B, r) selected factors; f is their share in all selections.
    """
    num_factors = probabilities.shape[-1]
    uses = torch.zeros_like(probabilities[0]).scatter_add_(
        0, index.flatten(), torch.ones_like(index, dtype=probabilities.dtype).flatten()
    )
    return num_factors * (uses / index.numel() * probabilities.mean(dim=0)).sum()


def straight_through_weight(probabilities: Tensor, index: Tensor) -> Tensor:
    """1 + p - stop_gradient(p) of the selected factors: (B, E), (B, r) -> (B, r), exactly one.

    The selection of Eq. 6 is 0/1 and passes no gradient; this passes the one that weights by probability would.
    """
    chosen = probabilities.gather(-1, index)
    return 1 + (chosen - chosen.detach())
