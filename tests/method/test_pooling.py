"""An instance's mean: its own tokens only, and always the same bits."""

from __future__ import annotations

import pytest
import torch

from mixlora_cli.method.packing import Segments
from mixlora_cli.method.pooling import masked_mean, own_tokens


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


def test_own_tokens_are_those_that_count() -> None:
    found = own_tokens(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]).bool())
    assert found.tokens.tolist() == [1, 2, 4, 5, 6, 7, 15]
    assert found.starts.tolist() == [0, 2, 6, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gap_leaves_the_mean(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]]).bool()
    hidden = torch.arange(18.0).view(2, 3, 3).to(dtype).requires_grad_()
    mean = masked_mean(hidden, mask)
    assert mean.tolist() == [[3.0, 4.0, 5.0], [12.0, 13.0, 14.0]]
    mean.sum().backward()
    expected = torch.tensor([[0.5, 0, 0.5], [1 / 3, 1 / 3, 1 / 3]]).unsqueeze(-1).expand(2, 3, 3)
    torch.testing.assert_close(hidden.grad, expected.to(dtype))


def test_instances_may_lie_anyhow() -> None:
    ids = torch.tensor([[1, 0, 0, 1, 1, 2]])
    found = own_tokens(torch.tensor([[1, 1, 1, 1, 1, 0]]).bool(), Segments(ids, 3))
    assert found.tokens.tolist() == [1, 2, 0, 3, 4]
    assert found.starts.tolist() == [0, 2, 5]
    hidden = torch.arange(12.0).view(1, 6, 2)
    expected = torch.tensor([[3.0, 4.0], [14 / 3, 17 / 3], [0.0, 0.0]])
    torch.testing.assert_close(masked_mean(hidden, None, found), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_on_either_side_changes_no_bit(dtype: torch.dtype) -> None:
    tokens = torch.randn(1, 37, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    alone = masked_mean(tokens, None)
    for left, right in ((0, 3), (5, 0), (64, 100)):
        padded = torch.nn.functional.pad(tokens, (0, 0, left, right), value=7.0)
        mask = torch.nn.functional.pad(torch.ones(1, 37).bool(), (left, right))
        assert torch.equal(masked_mean(padded, mask), alone)


def test_gradient_reaches_counted_tokens_alone() -> None:
    hidden = torch.randn(3, 5, 4, dtype=torch.float64).float().requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
    toward = torch.randn(3, 4)
    (masked_mean(hidden, mask) * toward).sum().backward()
    expected = torch.zeros(3, 5, 4)
    expected[0, :2], expected[2, 2:] = toward[0] / 2, toward[2] / 3
    torch.testing.assert_close(hidden.grad, expected)
