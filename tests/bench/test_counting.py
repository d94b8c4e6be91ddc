"""Bytes and operations against formulas."""

import torch
from torch import Tensor, nn

from mixlora_cli.analysis.bench.counting import (
    Operations,
    count_operations,
    peak_bytes,
    resting_bytes,
    saved_bytes,
)

CPU = torch.device("cpu")


def test_products_written_over_their_accumulator_count() -> None:
    left, right = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 5, 7)

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, left: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            return torch.zeros(2, 3, 7).baddbmm_(left, right)

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            flat = torch.zeros(3, 5).addmm_(gradient[0], right[0].T)
            return torch.stack([flat, flat])

    counted = count_operations(lambda: InPlace.apply(left), torch.ones(2, 3, 7))
    assert counted == Operations(forward=2 * 2 * 3 * 5 * 7, backward=2 * 3 * 7 * 5)


def test_saved_bytes_count_a_storage_once_and_no_parameter() -> None:
    layer = nn.Linear(4, 4)
    hidden = torch.randn(3, 4, requires_grad=True)
    assert saved_bytes(lambda: layer(hidden), layer) == 3 * 4 * 4
    assert saved_bytes(lambda: layer(hidden) + layer(hidden.view(3, 4)), layer) == 3 * 4 * 4
    assert saved_bytes(lambda: layer(hidden).exp(), layer) == 2 * 3 * 4 * 4


def test_resting_bytes_count_a_storage_once() -> None:
    tensor = torch.zeros(10)
    assert resting_bytes([tensor, tensor.view(2, 5), torch.zeros(3)]) == 4 * 13


def test_peak_is_the_most_that_is_alive_at_once() -> None:
    outside = torch.ones(1000)

    def run() -> None:
        first = outside + 1  # 4,000 bytes
        second = torch.cat([first, first])  # 8,000 more
        del first
        (second + 1).view(-1)  # 8,000 more, 4,000 less
        outside.add_(1)  # in place: nothing

    assert peak_bytes(run, CPU) == 16_000
    assert peak_bytes(run, CPU) == 16_000


def test_peak_sees_what_autograd_keeps_and_makes() -> None:
    weight = torch.ones(1000, requires_grad=True)

    def run() -> None:
        # exp and sin each keep their 4,000 bytes; backward's first gradient is an expanded scalar.
        weight.exp().sin().sum().backward()
        weight.grad = None

    assert 12_000 <= peak_bytes(run, CPU) <= 16_100
