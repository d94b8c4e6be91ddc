"""Variants are timed in turn, in shuffled order, warm-up left out."""

import gc
from collections.abc import Callable

import torch

from mixlora_cli.analysis.bench.clock import MAX_ROUNDS, Rounds, Variant, interleave

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
