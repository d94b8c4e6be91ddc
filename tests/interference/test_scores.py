"""Eq. 2 and 3 against numbers worked out by hand, and two tasks that want opposite things."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from mixlora_cli import MixLoraConfig
from mixlora_cli.analysis.interference.gradients import (
    Group,
    mean_unit_gradient,
    products,
    require_gradients,
    stack_directions,
)
from mixlora_cli.analysis.interference.scores import (
    VARIANTS,
    Measurement,
    count_denominators,
    draws,
    negative_interference,
    ratios,
    score,
)

GROUPS = (Group("layers.0.mlp.up_proj", "A"), Group("layers.0.self_attn.q_proj", "B"))
# u_0 = ((.6, .8) + (0, 1)) / 2 = (.3, .9), u_1 = ((1, 0) + (0, -1)) / 2 = (.5, -.5)
TASK_0, TASK_1 = [(3.0, 4.0), (0.0, 2.0)], [(1.0, 0.0), (0.0, -5.0)]


def measure(*by_task: list[list[Tensor]], groups: tuple[Group, ...] = GROUPS[:1]) -> Measurement:
    """By task, by batch, by group."""
    directions = stack_directions([mean_unit_gradient(batches) for batches in by_task])
    found = tuple(products(batches, directions) for batches in by_task)
    return Measurement(tuple(f"task {i}" for i in range(len(by_task))), groups, found)


def vectors(*batches: tuple[float, ...]) -> list[list[Tensor]]:
    return [[torch.tensor(batch)] for batch in batches]


def random_batches(
    seed: int, n: int = 5, sizes: tuple[int, ...] = (7, 4), scale: float = 1.0
) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[scale * (torch.randn(size, generator=generator) + 0.5) for size in sizes] for _ in range(n)]


def test_two_parameters_by_hand() -> None:
    found = measure(vectors(*TASK_0), vectors(*TASK_1))
    # (3,4): u_1.g = -.5, u_0.g = 4.5; (0,2): -1 and 1.8. (1,0): u_0.g = .3, u_1.g = .5; (0,-5): -4.5 and 2.5.
    assert ratios(found.products[0], 0)[:, 0, 1] == pytest.approx([-1 / 9, -5 / 9], abs=1e-6)
    assert ratios(found.products[1], 1)[:, 0, 0] == pytest.approx([0.6, -1.8], abs=1e-6)
    assert score(found, "mean").value == pytest.approx(np.array([[1, -1 / 3], [-0.6, 1]]), abs=1e-6)
    assert score(found, "median").value == pytest.approx(np.array([[1, -1 / 3], [-0.6, 1]]), abs=1e-6)
    by_means = np.array([[1, -0.75 / 3.15], [-2.1 / 1.5, 1]])
    assert score(found, "ratio_of_means").value == pytest.approx(by_means, abs=1e-6)
    cosine = -0.3 / math.sqrt(0.9 * 0.5)
    assert score(found, "cosine").value == pytest.approx(np.array([[1, cosine], [cosine, 1]]), abs=1e-6)
    assert negative_interference(score(found, "mean").value) == pytest.approx((1 / 3 + 0.6) / 2, abs=1e-6)


def test_streaming_equals_the_equation_written_with_all_gradients_at_hand() -> None:
    tasks = [random_batches(seed) for seed in range(3)]
    found = score(measure(*tasks, groups=GROUPS), "mean").value
    expected = np.zeros((3, 3))
    for i, batches in enumerate(tasks):
        for j, others in enumerate(tasks):
            for g in range(2):
                u = [torch.stack([b[g] / b[g].norm() for b in t]).double().mean(0) for t in (batches, others)]
                terms = [float((u[1] @ b[g].double()) / (u[0] @ b[g].double())) for b in batches]
                expected[i, j] += sum(terms) / len(terms) / 2
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_length_of_gradients_does_not_matter() -> None:
    usual, longer = (
        random_batches(1),
        [
            [g * factor for g in b]
            for b, factor in zip(random_batches(1), (1e-9, 3, 7e8, 0.2, 40), strict=True)
        ],
    )
    first, second = (measure(random_batches(0), task, groups=GROUPS) for task in (usual, longer))
    for variant in ("mean", "median", "cosine"):
        assert score(first, variant).value == pytest.approx(score(second, variant).value, rel=1e-5)
    scaled = measure(random_batches(0), random_batches(1, scale=1e6), groups=GROUPS)
    assert score(first, "ratio_of_means").value == pytest.approx(
        score(scaled, "ratio_of_means").value, rel=1e-5
    )


def test_the_diagonal_is_one_in_every_variant_and_every_bootstrap_sample() -> None:
    found = measure(*(random_batches(seed) for seed in range(4)), groups=GROUPS)
    for variant in VARIANTS:
        scores = score(found, variant, resample=True)
        assert np.diagonal(scores.value) == pytest.approx(np.ones(4), abs=1e-6)
        if scores.samples is not None:
            assert np.einsum("sii->si", scores.samples) == pytest.approx(np.ones((1_000, 4)), abs=1e-6)


def test_bad_denominators_are_counted_and_only_undefined_ones_left_out() -> None:
    # u_0 = (1, 1, 0, 0) / 4 + ...: the third batch is orthogonal but for a little, the fourth has no gradient.
    task = vectors((1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.001, 1.0), (-0.001, -1.0), (-1.0, 0.0), (0.0, 0.0))
    found = measure(task, vectors((0.0, 1.0), (0.0, 1.0)))
    counts = count_denominators(found, near_zero=0.01)[0]
    assert {key: value for key, value in counts.items() if isinstance(value, int)} == {
        "batches": 7,
        "total": 7,
        "zero_gradients": 1,
        "undefined": 1,
        "near_zero": 2,
        "negative": 2,
    }
    by_batch = ratios(found.products[0], 0)[:, 0, 1]
    assert np.isnan(by_batch[-1]) and abs(by_batch[3]) > 100
    assert score(found, "mean").value[0, 1] == pytest.approx(np.nanmean(by_batch))
    assert abs(score(found, "median").value[0, 1]) < 1e-6


def test_coherence_is_the_mean_cosine_between_batches_of_one_task() -> None:
    batches = random_batches(3, n=4, sizes=(6,))
    found = count_denominators(measure(batches, random_batches(4, sizes=(6,))), 0.01)[0]
    units = torch.stack([b[0] / b[0].norm() for b in batches])
    cosines = units @ units.T
    assert found["coherence"] == pytest.approx(float((cosines.sum() - 4) / 12), abs=1e-5)


def test_a_group_without_any_gradient_is_undefined_not_zero() -> None:
    zeros = [[torch.zeros(7), g[1]] for g in random_batches(0)]
    found = measure(zeros, random_batches(1), groups=GROUPS)
    alone = found.only([True, False])
    assert np.isnan(score(alone, "mean").value[0]).all() and np.isnan(score(alone, "cosine").value[0]).all()
    assert np.isfinite(score(found, "mean").value).all()


def test_intervals_cover_the_value_and_the_bootstrap_is_that_of_the_mean() -> None:
    found = measure(*(random_batches(seed, n=12) for seed in range(2)), groups=GROUPS)
    scores = score(found, "mean", resample=True)
    low, high = scores.interval() or (None, None)
    assert low is not None and low[0, 1] < scores.value[0, 1] < high[0, 1]
    by_batch = np.nanmean(ratios(found.products[0], 0), axis=1)
    assert scores.samples is not None
    assert scores.samples[:, 0, 1] == pytest.approx(by_batch[draws(12, 0)].mean(axis=1)[:, 1])


WIDTH = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.q_proj(hidden)
        return out


def conflicting(task: int) -> list[tuple[Tensor, Tensor]]:
    """Both tasks share four input features and want outputs of opposite sign; the last two tell them apart."""
    generator = torch.Generator().manual_seed(task)
    found = []
    for _ in range(6):
        hidden = torch.randn(4, 5, WIDTH, generator=generator) * 0.3 + 1.0
        hidden[..., 4:] = 0.0
        hidden[..., 4 + task] = 1.0
        found.append((hidden, torch.full((4, 5, 3), 3.0 - 6.0 * task)))
    return found


def routed(factors: int) -> Measurement:
    torch.manual_seed(0)
    config = MixLoraConfig(r=2, factors=factors, target_modules=["q_proj"], dropout=0.0, cfs="none")
    model = get_peft_model(Net(), config).eval()
    layer = model.base_model.model.q_proj
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.mixlora_factors_a["default"].weight.fill_(0.5)
        layer.mixlora_factors_b["default"].weight.normal_(std=0.01)
        for router in (layer.mixlora_router_a["default"], layer.mixlora_router_b["default"]):
            router.weight.zero_()
            router.weight[: factors // 2, 4] = 1.0
            router.weight[factors // 2 :, 5] = 1.0
    chosen = require_gradients(model)

    def gradients(task: int) -> list[list[Tensor]]:
        losses = ((model(hidden) - wanted).square().mean() for hidden, wanted in conflicting(task))
        return [[g.flatten() for g in torch.autograd.grad(loss, [*chosen.values()])] for loss in losses]

    directions = stack_directions([mean_unit_gradient(gradients(task)) for task in range(2)])
    found = tuple(products(gradients(task), directions) for task in range(2))
    return Measurement(("plus", "minus"), tuple(chosen), found)


def test_routing_that_separates_conflicting_tasks_removes_their_interference() -> None:
    # r = 2 of 2: everybody has all; r = 2 of 4: halves
    shared, separate = routed(factors=2), routed(factors=4)
    assert [group.name for group in shared.groups] == ["q_proj.A", "q_proj.B"]
    # For A the tasks' inputs have a cosine of 4 / 5 (four features in common, one of its own each), for B of 1.
    for matrix, expected in ((True, False), -0.8), ((False, True), -1.0):
        before = score(shared.only(matrix), "mean").value
        assert before[[0, 1], [1, 0]] == pytest.approx([expected, expected], abs=0.03)
        after = score(separate.only(matrix), "mean").value
        assert after[0, 1] == after[1, 0] == 0.0
        assert negative_interference(before) > 0.7 and negative_interference(after) == 0.0
