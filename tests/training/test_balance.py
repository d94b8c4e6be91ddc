"""The balance loss in training: its size, whom its gradient reaches, and how it adds up over a step's batches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixlora_cli.config import AdapterConfig, RoutingConfig, TrainConfig
from mixlora_cli.data.collate import PixelLoader
from mixlora_cli.data.encode import EncodedDataset, encode_records
from mixlora_cli.data.loading import load_records
from mixlora_cli.method.context import RoutingContext
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.method.selection import load_balance
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.training.arguments import build_arguments
from mixlora_cli.training.run_folder import RunFolder, read_metrics
from mixlora_cli.training.train import build_trainer, train
from mixlora_cli.training.trainer import AdapterTrainer, BalanceLoss

from .conftest import MakeConfig

WEIGHT = 0.5


def balanced(config: TrainConfig, weight: float) -> TrainConfig:
    """Routers that learn, without reports."""
    return replace(
        config,
        adapter=replace(config.adapter, router_grad="straight_through"),
        routing=RoutingConfig("instance", balance_loss=weight, health_every=0),
    )


def test_balance_of_four_instances_by_hand() -> None:
    """E = 2, r = 1: three of four choose factor 0; its mean probability is 0.6: 2 (3/4 * 0.6 + 1/4 * 0.4) = 1.1."""
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    index = torch.tensor([[0], [0], [0], [1]])
    assert load_balance(probabilities, index).item() == pytest.approx(1.1)


class FakeContext(RoutingContext):
    """Gives the balance losses that it was made with, one for each forward pass."""

    def __init__(self, *losses: Tensor) -> None:
        super().__init__()
        self.losses = list(losses)

    def balance_loss(self) -> Tensor:
        return self.losses.pop(0)


def test_shares_of_a_step_add_up_to_the_mean() -> None:
    losses = [torch.tensor(value, requires_grad=True) for value in (1.0, 3.0, 1.5, 2.5, 4.0)]
    balance = BalanceLoss(FakeContext(*losses), WEIGHT)
    # Two steps of two batches, then an epoch's last step with one.
    for num_batches in (2, 2, 2, 2, 1):
        balance.share(num_batches).backward()
    assert [loss.grad.item() for loss in losses] == [0.25, 0.25, 0.25, 0.25, 0.5]
    assert balance.read().item() == pytest.approx((2 + 2 + 4) / 3)
    balance = BalanceLoss(FakeContext(torch.tensor(7.0)), WEIGHT)
    balance.share(1)
    assert balance.read().item() == 7


@pytest.fixture
def trainer(make_config: MakeConfig, tmp_path: Path) -> AdapterTrainer:
    """Of a fresh tiny model with straight-through routers, not yet prepared for a loop."""
    config = balanced(make_config("run", batch_size=4), WEIGHT)
    base = build_tiny()
    dataset = encode_records(load_records(config.data, "train"), base.chat, 1792)
    torch.manual_seed(0)
    model = attach_adapter(
        base.model,
        AdapterConfig("mixlora", router_grad="straight_through", dropout=0.0),
        config.routing,
        2,
        4,
    )
    arguments = build_arguments(config, RunFolder(tmp_path / "run"), torch.float32)
    made = build_trainer(model, base, dataset, PixelLoader(base.chat), arguments, [])
    made.model.train()
    return made


def gradients(trainer: AdapterTrainer, rows: list[list[int]], weight: float) -> dict[str, Tensor]:
    """Gradients of one step that accumulates these batches of records, by parameter."""
    model = trainer.model
    assert model is not None and isinstance(model.base_model, MixLoraModel)
    model.zero_grad()
    trainer.balance = BalanceLoss(model.base_model.context, weight) if weight else None
    trainer.current_gradient_accumulation_steps = len(rows)
    dataset = trainer.train_dataset
    assert isinstance(dataset, EncodedDataset)
    num_tokens = sum(label != -100 for row in rows for i in row for label in dataset[i].labels[1:])
    for row in rows:
        batch: Any = trainer.data_collator([dataset[i] for i in row])
        trainer.compute_loss(model, batch, num_items_in_batch=num_tokens).backward()
    return {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }


def test_two_accumulated_batches_give_the_mean_of_their_balance_gradients(trainer: AdapterTrainer) -> None:
    """2 batches of 4: the gradient beside the answers' is the weight times the mean of the two balance gradients."""
    first, second = [0, 1, 2, 3], [4, 6, 7, 8]
    together = gradients(trainer, [first, second], WEIGHT)
    answers = gradients(trainer, [first, second], 0)
    # From the context alone: no trainer, no scaling.
    expected = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
    model = trainer.model
    assert model is not None and isinstance(model.base_model, MixLoraModel)
    context = model.base_model.context
    context.collect_balance = True
    for row in (first, second):
        model.zero_grad()
        trainer.read(model, trainer.data_collator([trainer.train_dataset[i] for i in row]))
        context.balance_loss().backward()
        for name, p in model.named_parameters():
            if name in expected and p.grad is not None:
                expected[name] += WEIGHT / 2 * p.grad
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-4
    for name, gradient in together.items():
        assert torch.allclose(
            gradient - answers[name], expected[name], rtol=1e-3, atol=1e-5 * largest + 1e-7
        ), name


def test_gradient_reaches_every_router_of_a_and_b(trainer: AdapterTrainer) -> None:
    model = trainer.model
    assert model is not None and isinstance(model.base_model, MixLoraModel)
    context = model.base_model.context
    BalanceLoss(context, WEIGHT)
    trainer.read(model, trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    loss = context.balance_loss()
    assert 1 <= loss.item() <= 4
    loss.backward()
    routers = {n: p for n, p in model.named_parameters() if "router_a." in n or "router_b." in n}
    assert len(routers) == 2 * 14
    assert [name for name, p in routers.items() if p.grad is None or not p.grad.any()] == []


def test_without_it_nothing_is_collected_and_nothing_is_added(trainer: AdapterTrainer) -> None:
    model = trainer.model
    assert model is not None and isinstance(model.base_model, MixLoraModel)
    context = model.base_model.context
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = trainer.compute_loss(model, dict(batch))
    assert not context.collect_balance and context.balance_terms == []
    # The last operation is the division by the number of tokens.
    assert loss.grad_fn.name() == "DivBackward0"
    trainer.balance = BalanceLoss(context, WEIGHT)
    with_balance = trainer.compute_loss(model, dict(batch))
    assert (with_balance - loss).item() == pytest.approx(WEIGHT * context.balance_loss().item(), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_metrics_tell_the_two_losses_apart(make_config: MakeConfig, checkpointing: bool) -> None:
    """The first step's loss is that of the answers, with the balance beside it."""
    runs = []
    for weight in (0.0, WEIGHT):
        config = make_config(f"run{weight}", steps=1, batch_size=2, accumulation=3, dropout=0.0)
        config = replace(config, train=replace(config.train, gradient_checkpointing=checkpointing))
        runs.append(RunFolder(train(balanced(config, weight))))
    (without,), (row,) = (read_metrics(run.metrics) for run in runs)
    assert "balance_loss" not in without
    assert row["loss"] == pytest.approx(without["loss"], rel=1e-5)
    assert 1 <= row["balance_loss"] <= 4
    assert not math.isclose(row["grad_norm"], without["grad_norm"], rel_tol=1e-3)


@pytest.mark.parametrize(
    ("routing", "router_grad", "message"),
    [
        (
            "instance",
            "none",
            "routing.balance_loss=0.1: the routers get no gradient with adapter.router_grad=none",
        ),
        ("random", "straight_through", "routing.balance_loss=0.1: routing=random has no routers"),
    ],
)
def test_refused_where_no_router_learns(
    make_config: MakeConfig, routing: Any, router_grad: Any, message: str
) -> None:
    config = make_config("run")
    with pytest.raises(ValueError, match=message):
        replace(
            config,
            adapter=replace(config.adapter, router_grad=router_grad),
            routing=RoutingConfig(routing, balance_loss=0.1),
        )
    with pytest.raises(ValueError, match="must be >= 0"):
        RoutingConfig("instance", balance_loss=-1.0)
