"""A static LoRA out of selected factors: those of one choice as they are, or the mean of many, cut to a rank.

Sizes: B instances, E factors in a pool, r of them selected. The update of instance i is
Delta_i = s F_B^T C_i F_A with the pools F_A (E, d_in), F_B (E, d_out), s = alpha / r, and C_i (E, E) that is one at its
r pairs (b_k, a_k), else zero (Eq. 9). The mean over instances needs the mean of C_i alone, and

mean_i ||Delta_i - M||^2 = mean_i ||Delta_i - mean||^2 + ||mean - M||^2 (Frobenius norms) for any matrix M. So among all
M of a rank the truncated singular value decomposition of the mean (Eckart and Young, 1936) is nearest to the updates
themselves. All of it happens in E x E matrices; nothing of size (d_out, d_in) is formed.

Where all instances select alike (routing=task, one task) nothing needs to be fitted: the r selected rows of F_A and F_B
are a LoRA's A and B, and s is its alpha / r.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce

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


def co_selection(selection: Selection, num_factors: int) -> Tensor:
    """Sum of C_i over the instances of a selection: (E, E) fp64."""
    pairs = (selection.index_b * num_factors + selection.index_a).flatten().cpu()
    counts = torch.bincount(pairs, minlength=num_factors**2)
    return counts.reshape(num_factors, num_factors).double()


def update_energies(selection: Selection, gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """||F_B^T C_i F_A||_F^2 = sum over pairs k, l of <b_k, b_l> <a_k, a_l>, without a (d_out, d_in) matrix.

    Args:
        selection: of B instances.
        gram_a: F_A F_A^T (E, E) fp64; gram_b: F_B F_B^T.

    Returns:
        (B,) fp64.
    """
    index_a, index_b = selection.index_a.cpu(), selection.index_b.cpu()
    products = (
        gram_a[index_a[:, :, None], index_a[:, None, :]] * gram_b[index_b[:, :, None], index_b[:, None, :]]
    )
    return products.sum(dim=(1, 2))


def observed(selection: Selection, gram_a: Tensor, gram_b: Tensor) -> Moments:
    """Moments of the instances that got `selection`; Gram matrices as in `update_energies`."""
    return Moments(
        core=co_selection(selection, len(gram_a)),
        energy=float(update_energies(selection, gram_a, gram_b).sum()),
        count=len(selection.index_a),
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


class Pools:
    """The two pools of one layer, F_A (E, d_in) and F_B (E, d_out), and the scale s = alpha / r; on the CPU.

    For what is fitted they are taken to orthogonal coordinates in fp64: F_A^T = Q_A R_A and F_B^T = Q_B R_B.
    """

    def __init__(self, factors_a: Tensor, factors_b: Tensor, scaling: float) -> None:
        self.factors_a, self.factors_b = factors_a.detach().cpu(), factors_b.detach().cpu()
        self.scaling = scaling

    @cached_property
    def _qr(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        qr_a, qr_b = (torch.linalg.qr(factors.double().T) for factors in (self.factors_a, self.factors_b))
        return (qr_a.Q, qr_a.R), (qr_b.Q, qr_b.R)

    @property
    def q_a(self) -> Tensor:
        """Q_A (d_in, E)."""
        return self._qr[0][0]

    @property
    def r_a(self) -> Tensor:
        """R_A (E, E)."""
        return self._qr[0][1]

    @property
    def q_b(self) -> Tensor:
        """Q_B (d_out, E)."""
        return self._qr[1][0]

    @property
    def r_b(self) -> Tensor:
        """R_B (E, E)."""
        return self._qr[1][1]

    @cached_property
    def gram_a(self) -> Tensor:
        """F_A F_A^T (E, E)."""
        gram: Tensor = self.r_a.T @ self.r_a
        return gram

    @cached_property
    def gram_b(self) -> Tensor:
        """F_B F_B^T (E, E)."""
        gram: Tensor = self.r_b.T @ self.r_b
        return gram


@dataclass(frozen=True)
class Energies:
    """What a static update keeps of the selected ones, in squared Frobenius norm."""

    selected: float
    """mean_i ||Delta_i||^2."""
    mean: float
    """||mean||^2."""
    kept: float
    """||mean cut to the rank||^2."""

    @property
    def lost_by_averaging(self) -> float:
        """mean_i ||Delta_i - mean||^2 / mean_i ||Delta_i||^2: 0 where every instance selects alike."""
        return _share(self.selected - self.mean, self.selected)

    @property
    def kept_by_rank(self) -> float:
        """Share of the mean's energy that the rank keeps."""
        return _share(self.kept, self.mean, of_nothing=1.0)

    @property
    def kept_in_all(self) -> float:
        """1 - mean_i ||Delta_i - static||^2 / mean_i ||Delta_i||^2."""
        return _share(self.kept, self.selected, of_nothing=1.0)

    def __add__(self, other: Energies) -> Energies:
        return Energies(self.selected + other.selected, self.mean + other.mean, self.kept + other.kept)

    def times(self, share: float) -> Energies:
        """Those of a share of the instances, to be added up with the others'."""
        return Energies(self.selected * share, self.mean * share, self.kept * share)


def _share(part: float, whole: float, of_nothing: float = 0.0) -> float:
    """Share of `part` in `whole`, within [0, 1], beyond which only rounding can lead."""
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else of_nothing


class MeanUpdate:
    """mean_i Delta_i = Q_B (s R_B C R_A^T) Q_A^T of one layer, with C the mean of C_i, by its singular values."""

    def __init__(self, pools: Pools, moments: Moments) -> None:
        self.pools = pools
        core = pools.scaling * pools.r_b @ (moments.core / moments.count) @ pools.r_a.T
        self._left, self.singular_values, self._right = torch.linalg.svd(core, full_matrices=False)
        self._selected = pools.scaling**2 * moments.energy / moments.count

    @property
    def rank(self) -> int:
        """Singular values that fp32 weights can hold beside the largest."""
        values = self.singular_values
        smallest = values[0] * len(values) * torch.finfo(torch.float32).eps
        return int((values > smallest).sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The nearest update of this rank as LoRA's A (rank, d_in) and B (d_out, rank), fp32, to be used at scale 1.

        Both sides get the square roots of the singular values; directions beyond the mean's own are zero.
        """
        count = min(rank, len(self.singular_values))
        roots = self.singular_values[:count].sqrt()
        lora_a = torch.zeros(rank, len(self.pools.q_a))
        lora_b = torch.zeros(len(self.pools.q_b), rank)
        lora_a[:count] = roots[:, None] * (self._right[:count] @ self.pools.q_a.T)
        lora_b[:, :count] = (self.pools.q_b @ self._left[:, :count]) * roots
        return lora_a, lora_b

    def energies(self, rank: int) -> Energies:
        squares = self.singular_values.square()
        return Energies(self._selected, float(squares.sum()), float(squares[:rank].sum()))


@dataclass(frozen=True)
class StaticLora:
    """A LoRA for all adapted layers."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """By layer: A (rank, d_in) and B (d_out, rank)."""
    rank: int
    alpha: float
    """The update is alpha / rank B A."""
    energies: Mapping[str, Energies]
    """By layer."""
    exact: bool
    """Whether it is the adapter itself, for the inputs that it is meant for."""


def fitted(pools: Mapping[str, Pools], moments: Mapping[str, Moments], rank: int | None) -> StaticLora:
    """The mean updates of every layer, cut to `rank`; None: to the largest rank that one of them has."""
    updates = {layer: MeanUpdate(pool, moments[layer]) for layer, pool in pools.items()}
    rank = rank or max(1, *(update.rank for update in updates.values()))
    return StaticLora(
        {layer: update.factors(rank) for layer, update in updates.items()},
        rank,
        float(rank),
        {layer: update.energies(rank) for layer, update in updates.items()},
        exact=False,
    )


def selected(pools: Mapping[str, Pools], chosen: Mapping[str, Selection], alpha: float) -> StaticLora:
    """The factors that one instance has selected, bit for bit; `chosen` (1, r) by layer."""
    factors, energies, rank = {}, {}, 0
    for layer, pool in pools.items():
        index_a, index_b = chosen[layer].index_a[0].cpu(), chosen[layer].index_b[0].cpu()
        rank = len(index_a)
        factors[layer] = (pool.factors_a[index_a], pool.factors_b[index_b].T.contiguous())
        energy = pool.scaling**2 * observed(chosen[layer], pool.gram_a, pool.gram_b).energy
        energies[layer] = Energies(energy, energy, energy)
    return StaticLora(factors, rank, alpha, energies, exact=True)
