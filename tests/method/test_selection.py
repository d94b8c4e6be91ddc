"""The equations of selection on numbers worked out by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from mixlora_cli.method.selection import (
    Selection,
    conditional_logits,
    conditional_logits_released,
    conditional_scores,
    fused_probabilities,
    independent_probabilities,
    random_factors,
    seeded_factors,
    soft_weight,
    straight_through_weight,
    top_factors,
)


def test_independent_probabilities_are_a_softmax() -> None:
    probabilities = independent_probabilities(torch.tensor([[0.0, math.log(3.0)]]))
    assert probabilities[0].tolist() == pytest.approx([0.25, 0.75])


def test_conditional_logits_contract_each_factor_with_its_own_matrix() -> None:
    rows = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])  # B=1, r=2, d=2
    weight = torch.tensor(
        [[[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]]]
    )  # (r, d, E=3)
    assert conditional_logits(rows, weight)[0].tolist() == [[1.0, 2.0, 4.0], [1.0, 3.0, -1.0]]
    # The published form: (1 + 2) (column sums 1, 1, 3) and (3 - 1) (column sums 3, 1, 1).
    assert conditional_logits_released(rows, weight)[0].tolist() == [[3.0, 3.0, 9.0], [6.0, 2.0, 2.0]]


def test_fusion_takes_the_softmax_of_a_sum_of_softmaxes() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3.0)]]])
    scores = conditional_scores(logits)
    assert scores[0].tolist() == pytest.approx([0.75, 1.25])
    second = math.exp(1.25) / (math.exp(0.75) + math.exp(1.25))
    fused = fused_probabilities(torch.tensor([[0.6, 0.4]]), scores)
    assert fused[0].tolist() == pytest.approx([0.6 + 1 - second, 0.4 + second])


def test_top_factors_come_best_first() -> None:
    assert top_factors(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 3).tolist() == [[1, 3, 2]]


def test_straight_through_weight_is_one_and_passes_the_gradient_of_the_probability() -> None:
    probabilities = torch.tensor([[0.1, 0.7, 0.2]], requires_grad=True)
    weight = straight_through_weight(probabilities, torch.tensor([[1, 0]]))
    assert weight.tolist() == [[1.0, 1.0]]
    (weight * torch.tensor([[5.0, 3.0]])).sum().backward()
    assert probabilities.grad.tolist() == [[3.0, 5.0, 0.0]]


def test_soft_weights_are_shares_of_the_chosen_and_pass_their_plain_gradient() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]], requires_grad=True)
    index = torch.tensor([[0, 2]])
    weight = soft_weight(independent_probabilities(logits), index)
    # e^3 / (e^3 + e^2) = 1 / (1 + 1/e); times two.
    share = 1 / (1 + math.exp(-1))
    assert weight.tolist() == [pytest.approx([2 * share, 2 * (1 - share)])]
    weight[0, 0].backward()
    slope = 2 * share * (1 - share)
    assert logits.grad.tolist() == [pytest.approx([slope, 0.0, -slope, 0.0], abs=1e-7)]


def test_selections_are_joined_and_taken_apart_with_their_weights() -> None:
    index, weight = torch.arange(6).view(3, 2), torch.rand(3, 2)
    whole = Selection.joined(
        [Selection(index[:1], index[:1] + 1, weight[:1]), Selection(index[1:], index[1:] + 1, weight[1:])]
    )
    assert torch.equal(whole.index_a, index) and torch.equal(whole.index_b, index + 1)
    part = whole.of(torch.tensor([2, 0]))
    assert torch.equal(part.index_a, index[[2, 0]]) and torch.equal(part.weight, weight[[2, 0]])
    assert Selection.joined([Selection(index, index)]).weight is None
    assert whole.without_gradient(True).weight is not None
    assert whole.without_gradient(False).weight is None


def test_random_factors_are_distinct_uniform_and_follow_the_seed() -> None:
    torch.manual_seed(5)
    drawn = random_factors(24_000, 4, 2, torch.device("cpu"))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 12
    # 2000 expected of each of the 12 ordered pairs; five standard deviations are 214.
    assert all(abs(count - 2000) < 214 for count in counts.values())
    torch.manual_seed(5)
    assert torch.equal(drawn, random_factors(24_000, 4, 2, torch.device("cpu")))


def splitmix64(state: int, count: int) -> list[int]:
    """The reference generator in whole numbers, its outputs as signed ones."""
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = state
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        word ^= word >> 31
        numbers.append(word - 2**64 if word >= 2**63 else word)
    return numbers


def test_seeded_factors_are_the_largest_numbers_of_splitmix64() -> None:
    # First output from state 0, as published with the generator.
    assert splitmix64(0, 1) == [0xE220A8397B1DCDAF - 2**64]
    seeds = [0, 1, 2**63 - 1, 0x123456789ABCDEF, 987654321]
    for stream in (0, 2**56 - 1):
        drawn = seeded_factors(torch.tensor(seeds), stream, 6, 3)
        for row, seed in zip(drawn.tolist(), seeds, strict=True):
            keys = splitmix64(seed ^ stream, 6)
            assert row == sorted(range(6), key=lambda place: -keys[place])[:3]


def test_seeded_factors_are_uniform_and_a_row_is_its_seed_s() -> None:
    seeds = torch.randint(2**62, (24_000,), generator=torch.Generator().manual_seed(0))
    drawn = seeded_factors(seeds, 17, 4, 2)
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 12
    assert all(abs(count - 2000) < 214 for count in counts.values())
    assert torch.equal(seeded_factors(seeds[7:8], 17, 4, 2), drawn[7:8])
    # The next stream is another draw: 1 in 12 agrees by chance, five standard deviations are 214.
    agree = int((seeded_factors(seeds, 18, 4, 2) == drawn).all(dim=1).sum())
    assert abs(agree - 2000) < 214
