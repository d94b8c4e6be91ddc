"""The equations of selection on numbers worked out by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from mixlora_cli.method.selection import (
    conditional_logits,
    conditional_logits_released,
    conditional_scores,
    fused_probabilities,
    independent_probabilities,
    masked_mean,
    random_factors,
    straight_through_weight,
    top_factors,
)


def test_masked_mean_counts_own_tokens_only() -> None:
    hidden = torch.tensor(
        [[[2.0, 0.0], [4.0, 6.0], [100.0, 100.0]], [[100.0, 100.0], [8.0, 2.0], [1.0, 1.0]]]
    )
    mask = torch.tensor([[True, True, False], [False, True, False]])
    assert masked_mean(hidden, mask).tolist() == [[3.0, 3.0], [8.0, 2.0]]
    assert masked_mean(hidden, None)[1].tolist() == pytest.approx([109 / 3, 103 / 3])


def test_masked_mean_of_nothing_is_zero_and_accumulates_in_fp32() -> None:
    assert masked_mean(torch.ones(1, 2, 2), torch.zeros(1, 2).bool()).tolist() == [[0.0, 0.0]]
    # 256 + 1 is 256 in bf16: summing there would lose every later one.
    hidden = torch.ones(1, 1001, 1, dtype=torch.bfloat16)
    hidden[0, 0] = 256
    mean = masked_mean(hidden, torch.ones(1, 1001).bool())
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(1256 / 1001, rel=1e-6)


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
