"""The equations of selection on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mixlora_cli.method.selection import (
    Selection,
    conditional_logits,
    conditional_logits_released,
    conditional_scores,
    fused_probabilities,
    independent_probabilities,
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


def test_selections_are_joined_and_taken_apart() -> None:
    index, weight = torch.arange(6).view(3, 2), torch.ones(3, 2)
    whole = Selection.joined(
        [Selection(index[:1], index[:1] + 1), Selection(index[1:], index[1:] + 1, weight[1:])]
    )
    assert torch.equal(whole.index_a, index) and torch.equal(whole.index_b, index + 1)
    part = whole.of(torch.tensor([2, 0]))
    assert torch.equal(part.index_a, index[[2, 0]]) and torch.equal(part.index_b, index[[2, 0]] + 1)
    learning = Selection(index, index, weight)
    assert learning.without_gradient().weight is None and learning.weight is weight
