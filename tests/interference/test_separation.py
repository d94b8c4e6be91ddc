"""Two tasks that want opposite things: routing that gives each its own factors takes the conflict away."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from mixlora_cli import MixLoraConfig
from mixlora_cli.analysis.interference.gradients import (
    mean_unit_gradient,
    products,
    require_gradients,
    stack_directions,
)
from mixlora_cli.analysis.interference.scores import Measurement, negative_interference, score

WIDTH = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.q_proj(hidden)
        return out


def batches(task: int) -> list[tuple[Tensor, Tensor]]:
    """Both tasks share four input features and want outputs of opposite sign; the last two tell them apart."""
    generator = torch.Generator().manual_seed(task)
    found = []
    for _ in range(6):
        hidden = torch.randn(4, 5, WIDTH, generator=generator) * 0.3 + 1.0
        hidden[..., 4:] = 0.0
        hidden[..., 4 + task] = 1.0
        found.append((hidden, torch.full((4, 5, 3), 3.0 - 6.0 * task)))
    return found


def measure(factors: int) -> Measurement:
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
        losses = ((model(hidden) - wanted).square().mean() for hidden, wanted in batches(task))
        return [[g.flatten() for g in torch.autograd.grad(loss, chosen.parameters)] for loss in losses]

    directions = stack_directions([mean_unit_gradient(gradients(task)) for task in range(2)])
    found = tuple(products(gradients(task), directions) for task in range(2))
    return Measurement(("plus", "minus"), chosen.groups, found)


def test_routing_that_separates_conflicting_tasks_removes_their_interference() -> None:
    shared, separate = (
        measure(factors=2),
        measure(factors=4),
    )  # r = 2 of 2: everybody has all; r = 2 of 4: halves
    assert [group.name for group in shared.groups] == ["q_proj.A", "q_proj.B"]
    # For A the tasks' inputs have a cosine of 4 / 5 (four features in common, one of its own each), for B of 1.
    for matrix, expected in ((True, False), -0.8), ((False, True), -1.0):
        before = score(shared.only(matrix), "mean").value
        assert before[[0, 1], [1, 0]] == pytest.approx([expected, expected], abs=0.03)
        after = score(separate.only(matrix), "mean").value
        assert after[0, 1] == after[1, 0] == 0.0
        assert negative_interference(before) > 0.7 and negative_interference(after) == 0.0
