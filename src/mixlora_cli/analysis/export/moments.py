"""How often factors were selected together, and how large the selected updates were: all that a fit needs.

Sizes: B instances, E factors in a pool, r of them selected. The update of instance i is
Delta_i = s F_B^T C_i F_A with the pools F_A (E, d_in), F_B (E, d_out), s = alpha / r, and C_i (E, E) that is one at its
r pairs (b_k, a_k), else zero (Eq. 9). The mean over instances needs the mean of C_i alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from mixlora_cli.method.selection import Selection


@dataclass(frozen=True)
class Moments:
    """Sums over the instances of one layer; the unit of energy is that of the squared weights, without the scale s."""

    core: Tensor
    """(E, E) fp64, sum of C_i: how many instances paired factor b of B (row) with factor a of A (column)."""
    energy: float
    """Sum of ||F_B^T C_i F_A||_F^2."""
    count: float
    """Instances."""

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.core + other.core, self.energy + other.energy, self.count + other.count)

    def times(self, number: int) -> Moments:
        """Those of `number` copies of the same instances."""
        return Moments(self.core * number, self.energy * number, self.count * number)


def total(moments: Iterable[Moments]) -> Moments:
    """Those of all instances together; at least one must be given."""
    return reduce(Moments.__add__, moments)


def co_selection(index_a: Tensor, index_b: Tensor, num_factors: int) -> Tensor:
    """Sum of C_i over instances: indices (B, r) each -> (E, E) fp64."""
    pairs = (index_b * num_factors + index_a).flatten().cpu()
    counts = torch.bincount(pairs, minlength=num_factors**2)
    return counts.reshape(num_factors, num_factors).double()


def update_energies(index_a: Tensor, index_b: Tensor, gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """||F_B^T C_i F_A||_F^2 = sum over pairs k, l of <b_k, b_l> <a_k, a_l>, without forming a (d_out, d_in) matrix.

    Args:
        index_a: (B, r); index_b likewise.
        gram_a: F_A F_A^T (E, E) fp64; gram_b: F_B F_B^T.

    Returns:
        (B,) fp64.
    """
    index_a, index_b = index_a.cpu(), index_b.cpu()
    products_a = gram_a[index_a[:, :, None], index_a[:, None, :]]
    products_b = gram_b[index_b[:, :, None], index_b[:, None, :]]
    return (products_a * products_b).sum(dim=(1, 2))


def observed(selection: Selection, gram_a: Tensor, gram_b: Tensor) -> Moments:
    """Moments of the instances that got `selection`; Gram matrices as in `update_energies`."""
    index_a, index_b = selection.index_a, selection.index_b
    return Moments(
        core=co_selection(index_a, index_b, len(gram_a)),
        energy=float(update_energies(index_a, index_b, gram_a, gram_b).sum()),
        count=len(index_a),
    )


def expected_at_random(gram_a: Tensor, gram_b: Tensor, rank: int) -> Moments:
    """Moments of routing=random, exactly: r distinct factors of each pool, every ordered choice equally likely.

    Each of the E^2 pairs is the k-th one with probability 1 / E^2, so E[C_i] = r / E^2 everywhere, which has rank one.
    Two of the r pairs are any two different factors of A and, independently, of B.
    """
    num_factors = len(gram_a)
    same = _mean_product(gram_a, same=True) * _mean_product(gram_b, same=True)
    different = _mean_product(gram_a, same=False) * _mean_product(gram_b, same=False)
    core = torch.full((num_factors, num_factors), rank / num_factors**2, dtype=torch.float64)
    return Moments(core, rank * same + rank * (rank - 1) * different, count=1)


def _mean_product(gram: Tensor, same: bool) -> float:
    """Mean of a Gram matrix (E, E) on its diagonal, or off it (0 for a single factor)."""
    diagonal, size = float(gram.trace()), len(gram)
    if same:
        return diagonal / size
    return (float(gram.sum()) - diagonal) / (size * (size - 1)) if size > 1 else 0.0
