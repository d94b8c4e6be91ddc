"""Measures of factor use against values by hand, enumeration and chance."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixlora_cli.method import health
from mixlora_cli.method.selection import random_factors


def chance(num_layers: int, num_instances: int, num_factors: int, rank: int, seed: int = 0) -> Tensor:
    """(L, B, r) random selections."""
    torch.manual_seed(seed)
    return random_factors(num_layers * num_instances, num_factors, rank, torch.device("cpu")).view(
        num_layers, num_instances, rank
    )


def test_tally_equals_a_plain_loop() -> None:
    num_layers, num_factors, rank = 3, 8, 3
    tally = health.new_tally(num_layers, num_factors, torch.device("cpu"))
    uses: list[dict[str, list[int]]] = [{"a": [], "b": []} for _ in range(num_layers)]
    shared = [0] * num_layers
    for seed in range(4):
        a, b = (chance(num_layers, 5, num_factors, rank, 2 * seed + side) for side in (0, 1))
        health.count(tally, a, b)
        for layer in range(num_layers):
            for chosen_a, chosen_b in zip(a[layer].tolist(), b[layer].tolist(), strict=True):
                uses[layer]["a"] += chosen_a
                uses[layer]["b"] += chosen_b
                shared[layer] += len(set(chosen_a) & set(chosen_b))
    counts_a, counts_b, num_shared = health.split_tally(tally)
    for counts, side in ((counts_a, "a"), (counts_b, "b")):
        expected = [[row[side].count(factor) for factor in range(num_factors)] for row in uses]
        assert counts.tolist() == expected
        assert counts.sum(dim=1).tolist() == [4 * 5 * rank] * num_layers
    assert num_shared.tolist() == shared


def by_task(index_a: Tensor, index_b: Tensor, tasks: Tensor, num_factors: int) -> Tensor:
    tally = torch.zeros(len(index_a), int(tasks.max()) + 1, 2 * num_factors, dtype=torch.int64)
    health.count_by_task(tally, tasks, index_a, index_b)
    return tally


def test_uses_are_counted_task_by_task() -> None:
    a, b = chance(2, 7, 8, 3, seed=1), chance(2, 7, 8, 3, seed=2)
    tasks = torch.tensor([0, 2, 2, 1, 0, 0, 2])
    tally = by_task(a, b, tasks, 8)
    for layer in range(2):
        for task in range(3):
            rows = (tasks == task).nonzero().flatten()
            for side, index in enumerate((a, b)):
                counted = tally[layer, task, 8 * side : 8 * (side + 1)].tolist()
                assert counted == [index[layer, rows].flatten().tolist().count(factor) for factor in range(8)]


def test_what_a_task_says_of_the_factors() -> None:
    """Nothing where chance selects, log(E / r) where each task has factors of its own, log 2 / 2 where half are."""
    tasks = torch.arange(4).repeat(100)
    own = (4 * tasks.unsqueeze(1) + torch.arange(4)).unsqueeze(0)
    half = torch.cat([own[..., :2], torch.tensor([0, 1]).expand(1, 400, 2) + 16], dim=-1)
    counts = by_task(own, chance(1, 400, 16, 4), tasks, 16)
    # 12 * 3 / (2 * 4 * 400) is taken off, which is what chance alone would show.
    assert health.task_information(counts[..., :16], 4).item() == pytest.approx(math.log(4) - 0.01125)
    many = torch.cat(
        [
            by_task(chance(200, 100, 16, 4, seed), chance(200, 100, 16, 4), tasks[:100], 16)
            for seed in range(3)
        ]
    )
    found = health.task_information(many[..., :16], 4)
    # Of a plain estimate 0.045 would be left.
    assert abs(found.mean().item()) < 0.005 and found.std().item() < 0.03
    part = health.task_information(by_task(half, half, tasks, 18)[..., :18], 4).item()
    assert part == pytest.approx(math.log(4) / 2 - 14 * 3 / 3200)


class OperationCount(TorchDispatchMode):
    """Counts the operations that reach a device; one that reads a value back is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "waits for the device"
        self.number += 1
        return func(*args, **(kwargs or {}))


def num_operations(num_layers: int) -> int:
    a, b = chance(num_layers, 4, 16, 4, 0), chance(num_layers, 4, 16, 4, 1)
    tally = health.new_tally(num_layers, 16, torch.device("cpu"))
    with OperationCount() as counted:
        health.count(tally, a, b)
    return counted.number


def test_counting_costs_the_same_few_operations_for_any_number_of_layers() -> None:
    assert num_operations(210) == num_operations(2) <= 20


def test_entropy_and_unused_factors_by_hand() -> None:
    counts = torch.tensor([[5, 5, 5, 5], [6, 6, 0, 0], [9, 0, 0, 0], [4, 2, 2, 0]])
    assert health.normalised_entropy(counts).tolist() == pytest.approx([1.0, 0.5, 0.0, 0.75])
    assert health.unused_share(counts).tolist() == [0.0, 0.5, 0.75, 0.25]
    assert health.normalised_entropy(torch.tensor([[7]])).tolist() == [1.0]
    assert health.normalised_entropy(torch.zeros(1, 4, dtype=torch.long)).tolist() == [0.0]


def test_shared_factors_and_churn_ignore_the_order() -> None:
    before = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [0, 1]]])
    now = torch.tensor([[[1, 0], [3, 0]], [[2, 3], [2, 3]]])
    assert health.num_shared(before, now).tolist() == [[2, 1], [0, 0]]
    assert health.churn(before, now).tolist() == [0.25, 1.0]
    assert health.churn(before, before).tolist() == [0.0, 0.0]


def test_chance_agrees_to_r_of_e_and_uses_all_factors_evenly() -> None:
    num_factors, rank, num_instances = 16, 4, 20_000
    a, b = chance(1, num_instances, num_factors, rank, 0), chance(1, num_instances, num_factors, rank, 1)
    tally = health.new_tally(1, num_factors, torch.device("cpu"))
    health.count(tally, a, b)
    counts_a, _, shared = health.split_tally(tally)
    assert shared.item() / (num_instances * rank) == pytest.approx(rank / num_factors, abs=0.005)
    assert health.normalised_entropy(counts_a).item() == pytest.approx(1, abs=1e-3)
    assert health.churn(a, b).item() == pytest.approx(1 - rank / num_factors, abs=0.005)


@pytest.mark.parametrize("tasks", [(10, 10), (30, 10), (99, 1)])
def test_entropy_of_own_factors_is_the_mean_over_all_draws_for_two_tasks(tasks: tuple[int, int]) -> None:
    num_factors, rank = 6, 2
    sets = list(combinations(range(num_factors), rank))
    total = 0.0
    for first in sets:
        for second in sets:
            counts = torch.zeros(num_factors, dtype=torch.long)
            counts[list(first)] += tasks[0]
            counts[list(second)] += tasks[1]
            total += health.entropy(counts).item()
    expected = total / len(sets) ** 2
    assert health.entropy_of_own_factors(torch.tensor(tasks), rank, num_factors) == pytest.approx(expected)


def test_entropy_of_own_factors_has_the_pool_as_its_limit() -> None:
    assert health.entropy_of_own_factors(torch.tensor([7] * 100), 4, 16) == pytest.approx(math.log(16))
    assert health.entropy_of_own_factors(torch.tensor([7]), 4, 16) == pytest.approx(math.log(4))
    assert health.entropy_of_own_factors(torch.tensor([5, 5]), 8, 8) == pytest.approx(math.log(8))


def test_variety_is_zero_for_one_selection_and_one_for_one_of_each_task() -> None:
    tasks = torch.tensor([50, 50])
    same = [100, 100, 0, 0, 0, 0, 0, 0]
    disjoint = [50, 50, 50, 50, 0, 0, 0, 0]
    varied = [25] * 8
    variety = health.variety(torch.tensor([same, disjoint, varied]), tasks, rank=2)
    # Two tasks share 2 of 8 factors by chance: log 2 apart is 4/3 of the expected 3/4 log 2.
    assert variety.tolist() == pytest.approx([0.0, 4 / 3, 8 / 3])
    assert health.collapsed(variety, variety.flip(0)).tolist() == [True, False, True]


def test_one_instance_in_a_hundred_marks_the_threshold() -> None:
    tasks = torch.tensor([5000, 5000])

    def with_others(others: int) -> float:
        counts = torch.zeros(1, 16, dtype=torch.long)
        counts[0, :4], counts[0, 4:8] = 10_000 - others, others
        return health.variety(counts, tasks, rank=4).item()

    assert with_others(80) < health.COLLAPSED_BELOW < with_others(100)


@pytest.mark.parametrize(("tasks", "rank"), [((40,), 2), ((40, 0), 2), ((20, 20), 4)])
def test_no_choice_and_no_tasks_to_tell_apart_are_no_collapse(tasks: tuple[int, ...], rank: int) -> None:
    counts = torch.tensor([[40] * rank + [0] * (4 - rank)])
    variety = health.variety(counts, torch.tensor(tasks), rank)
    assert variety.isnan().tolist() == [True]
    assert health.collapsed(variety, variety).tolist() == [False]
