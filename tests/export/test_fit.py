"""The mean update, its truncation and its energies, against loops over full matrices."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mixlora_cli.analysis.export.fit import (
    Energies,
    MeanUpdate,
    Moments,
    Pools,
    co_selection,
    expected_at_random,
    observed,
    selected,
    total,
)
from mixlora_cli.method.selection import Selection

D_IN, D_OUT, E, R, N = 12, 9, 6, 3, 20
SCALING = 4.0


def delta(factors_a: Tensor, factors_b: Tensor, index_a: Tensor, index_b: Tensor) -> Tensor:
    """s sum_k b_k a_k^T of one instance, as a full (d_out, d_in) matrix."""
    update = torch.zeros(factors_b.shape[1], factors_a.shape[1], dtype=torch.float64)
    for a, b in zip(index_a.tolist(), index_b.tolist(), strict=True):
        update += SCALING * torch.outer(factors_b[b], factors_a[a])
    return update


@pytest.fixture
def pools() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(E, D_IN, dtype=torch.float64), torch.randn(E, D_OUT, dtype=torch.float64)


@pytest.fixture
def selection() -> Selection:
    """Skewed, so that the co-selection matrix is not near uniform."""
    torch.manual_seed(1)
    scores = torch.rand(2, N, E) * torch.linspace(1, 3, E)
    index = scores.topk(R, dim=-1).indices
    return Selection(index[0], index[1])


def deltas_of(pools: tuple[Tensor, Tensor], selection: Selection) -> Tensor:
    """Of all instances (N, d_out, d_in)."""
    chosen = zip(selection.index_a, selection.index_b, strict=True)
    return torch.stack([delta(*pools, *each) for each in chosen])


def fitted(pools: tuple[Tensor, Tensor], selection: Selection) -> MeanUpdate:
    layer = Pools(*pools, SCALING)
    return MeanUpdate(layer, observed(selection, layer.gram_a, layer.gram_b))


@pytest.mark.parametrize("rank", [1, 3, E])
def test_truncated_mean_equals_the_loop(
    pools: tuple[Tensor, Tensor], selection: Selection, rank: int
) -> None:
    deltas = deltas_of(pools, selection)
    mean = deltas.mean(dim=0)
    left, values, right = torch.linalg.svd(mean)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]

    update = fitted(pools, selection)
    lora_a, lora_b = update.factors(rank)
    assert (lora_a.shape, lora_b.shape) == ((rank, D_IN), (D_OUT, rank))
    torch.testing.assert_close((lora_b @ lora_a).double(), best, rtol=0, atol=1e-5)
    # Both sides carry the square roots of the singular values.
    roots = values[:rank].sqrt().float()
    torch.testing.assert_close(lora_a.norm(dim=1), roots)
    torch.testing.assert_close(lora_b.norm(dim=0), roots)

    energies = update.energies(rank)
    selected = deltas.square().sum(dim=(1, 2)).mean().item()
    apart = (deltas - mean).square().sum(dim=(1, 2)).mean().item()
    missed = (deltas - best).square().sum(dim=(1, 2)).mean().item()
    assert energies.selected == pytest.approx(selected, rel=1e-9)
    assert energies.lost_by_averaging == pytest.approx(apart / selected, rel=1e-9)
    assert energies.kept_by_rank == pytest.approx(best.square().sum().item() / mean.square().sum().item())
    assert energies.kept_in_all == pytest.approx(1 - missed / selected, rel=1e-9)
    assert 0.05 < energies.lost_by_averaging < 0.95


def test_energies_by_hand() -> None:
    """Two instances, orthonormal factors: one takes the pair (0, 0), the other (1, 1); s = 2."""
    layer = Pools(torch.eye(2, 3), torch.eye(2, 4), scaling=2.0)
    index = torch.tensor([[0], [1]])
    update = MeanUpdate(layer, observed(Selection(index, index), layer.gram_a, layer.gram_b))
    # Each update has energy 2^2 = 4; the mean has 1 at two places: energy 2, distance 4 - 2.
    whole, cut = update.energies(2), update.energies(1)
    assert (whole.selected, whole.mean) == pytest.approx((4.0, 2.0))
    assert whole.lost_by_averaging == pytest.approx(0.5)
    assert (whole.kept_by_rank, whole.kept_in_all) == pytest.approx((1.0, 0.5))
    assert (cut.kept_by_rank, cut.kept_in_all) == pytest.approx((0.5, 0.25))
    assert (whole + cut).kept_in_all == pytest.approx(3 / 8)
    assert update.rank == 2


def test_an_untrained_adapter_exports_to_nothing() -> None:
    layer = Pools(torch.randn(E, D_IN), torch.zeros(E, D_OUT), SCALING)
    update = MeanUpdate(layer, expected_at_random(layer.gram_a, layer.gram_b, R))
    lora_a, lora_b = update.factors(2)
    assert update.rank == 0 and not (lora_b @ lora_a).any()
    nothing = update.energies(2)
    assert nothing == Energies(0.0, 0.0, 0.0)
    assert (nothing.lost_by_averaging, nothing.kept_in_all) == (0.0, 1.0)


def test_pools_with_more_factors_than_features() -> None:
    torch.manual_seed(3)
    factors_a, factors_b = torch.randn(E, 4).double(), torch.randn(E, 5).double()
    chosen = Selection(torch.tensor([[0, 3], [2, 5]]), torch.tensor([[1, 4], [5, 0]]))
    lora_a, lora_b = fitted((factors_a, factors_b), chosen).factors(E)
    mean = (
        delta(factors_a, factors_b, chosen.index_a[0], chosen.index_b[0])
        + delta(factors_a, factors_b, chosen.index_a[1], chosen.index_b[1])
    ) / 2
    torch.testing.assert_close((lora_b @ lora_a).double(), mean, rtol=0, atol=1e-5)
    assert (lora_a.shape, lora_b.shape) == ((E, 4), (5, E))


def test_co_selection_counts_pairs_in_order() -> None:
    index = torch.tensor([[0, 2], [2, 0]]), torch.tensor([[1, 0], [0, 2]])
    assert co_selection(Selection(*index), 3).tolist() == [[0, 0, 2], [1, 0, 0], [1, 0, 0]]


def test_what_one_instance_selected_is_exported_as_it_is(
    pools: tuple[Tensor, Tensor], selection: Selection
) -> None:
    first = selection.of(torch.tensor([0]))
    lora = selected({"layer": Pools(*pools, SCALING)}, {"layer": first}, SCALING * R)
    lora_a, lora_b = lora.factors["layer"]
    assert (lora.rank, lora.alpha, lora.exact) == (R, SCALING * R, True)
    expected = deltas_of(pools, first)[0]
    torch.testing.assert_close(SCALING * (lora_b.double() @ lora_a.double()), expected, rtol=1e-6, atol=1e-6)
    energy = expected.square().sum().item()
    assert lora.energies["layer"].selected == pytest.approx(energy, rel=1e-6)


def test_moments_of_parts_add_up(pools: tuple[Tensor, Tensor], selection: Selection) -> None:
    layer = Pools(*pools, SCALING)

    def of(rows: slice) -> Moments:
        part = selection.of(torch.arange(N)[rows])
        return observed(part, layer.gram_a, layer.gram_b)

    whole, joined = of(slice(None)), total([of(slice(0, 7)), of(slice(7, None))])
    assert torch.equal(whole.core, joined.core)
    assert (whole.energy, whole.count) == pytest.approx((joined.energy, joined.count))
    twice = MeanUpdate(layer, whole.times(2))
    torch.testing.assert_close(twice.singular_values, MeanUpdate(layer, whole).singular_values)


def test_random_routing_is_the_mean_over_every_ordered_choice() -> None:
    torch.manual_seed(4)
    factors_a, factors_b = torch.randn(4, 7).double(), torch.randn(4, 5).double()
    choices = torch.tensor(list(itertools.permutations(range(4), 2)))
    every = Selection(choices.repeat_interleave(len(choices), dim=0), choices.repeat(len(choices), 1))
    layer = Pools(factors_a, factors_b, SCALING)
    counted = observed(every, layer.gram_a, layer.gram_b)
    expected = expected_at_random(layer.gram_a, layer.gram_b, rank=2)
    assert len(every.index_a) == 144
    torch.testing.assert_close(expected.core, counted.core / counted.count)
    assert expected.energy == pytest.approx(counted.energy / counted.count, rel=1e-12)
    assert MeanUpdate(layer, expected).rank == 1
