"""The clock: variants in turn, in shuffled order, warm-up left out. The counters: bytes and operations by formulas."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixlora_cli.analysis.bench.counters import (
    MAX_ROUNDS,
    Operations,
    Rounds,
    Variant,
    count_operations,
    interleave,
    peak_bytes,
    resting_bytes,
    saved_bytes,
)

CPU = torch.device("cpu")


class Hands:
    """A clock that stands still unless a variant moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def variant(self, name: str, seconds: float) -> Variant:
        return Variant(self._move(name, seconds), self._move(f"before {name}", 100.0))

    def _move(self, name: str, seconds: float) -> Callable[[], None]:
        def move() -> None:
            self.now += seconds
            self.log.append(name)

        return move


def timed(rounds: Rounds) -> tuple[Hands, dict[str, list[float]]]:
    hands = Hands()
    variants = {"slow": hands.variant("slow", 3.0), "quick": hands.variant("quick", 1.0)}
    return hands, interleave(variants, rounds, CPU, hands)


def test_times_are_those_of_the_variant_alone() -> None:
    _, times = timed(Rounds(4))
    assert times == {"slow": [3.0] * 4, "quick": [1.0] * 4}


def test_every_round_runs_each_variant_once_after_its_preparation() -> None:
    hands, _ = timed(Rounds(6, warmup=2))
    assert len(hands.log) == 4 * (6 + 2)
    for start in range(0, len(hands.log), 4):
        names = hands.log[start : start + 4]
        assert sorted(names) == ["before quick", "before slow", "quick", "slow"]
        assert names[0] == f"before {names[1]}" and names[2] == f"before {names[3]}"


def test_the_order_is_drawn_anew_and_repeats_with_the_seed() -> None:
    first = [timed(Rounds(12, seed=seed))[0].log for seed in (0, 0, 1)]
    orders = {tuple(first[0][start : start + 4]) for start in range(0, 48, 4)}
    assert len(orders) == 2
    assert first[0] == first[1] != first[2]


def test_a_quick_case_gets_more_rounds() -> None:
    # A round moves the clock by 204 seconds, preparation included.
    _, times = timed(Rounds(2, min_seconds=1000))
    assert len(times["slow"]) == 5
    assert len(timed(Rounds(1, min_seconds=1e9))[1]["slow"]) == MAX_ROUNDS


def test_garbage_is_not_collected_meanwhile() -> None:
    seen = []
    interleave({"one": Variant(lambda: seen.append(gc.isenabled()))}, Rounds(1), CPU)
    assert seen == [False] and gc.isenabled()


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
