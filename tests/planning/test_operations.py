"""Predicted operations against torch's own counter."""

import pytest
import torch
from planning_reality import BATCH, LABELS, LENGTH, Case
from torch.utils.flop_counter import FlopCounterMode

from mixlora_cli.analysis.planning.network import Linear, Network, Update
from mixlora_cli.analysis.planning.operations import Batch, operations
from mixlora_cli.config import AdapterConfig

BATCH_OF_REALITY = Batch(BATCH, LENGTH, LABELS)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("adapter", ["lora", "mixlora", "full"])
def test_operations_are_those_that_torch_counts(adapter: str, dropout: float, checkpointing: bool) -> None:
    case = Case(AdapterConfig(name=adapter, dropout=dropout), checkpointing=checkpointing)  # type: ignore[arg-type]
    forward, backward = case.counted_operations()
    predicted = operations(case.network, BATCH_OF_REALITY, checkpointing)
    assert predicted.forward == pytest.approx(forward, rel=1e-3)
    assert predicted.backward + predicted.recomputation == pytest.approx(backward, rel=0.01)
    assert (predicted.recomputation > 0) == checkpointing


@pytest.mark.parametrize(
    ("fields", "routing"),
    [({"cfs": "none"}, "instance"), ({}, "random"), ({"router_grad": "straight_through"}, "instance")],
)
def test_routers_are_counted_as_they_are_configured(fields: dict[str, str], routing: str) -> None:
    case = Case(AdapterConfig(name="mixlora", **fields), routing=routing)  # type: ignore[arg-type]
    forward, backward = case.counted_operations()
    predicted = operations(case.network, BATCH_OF_REALITY, False)
    assert predicted.forward == pytest.approx(forward, rel=1e-3)
    assert predicted.backward == pytest.approx(backward, rel=0.03)


def test_a_frozen_base_saves_the_weight_gradients() -> None:
    frozen = operations(Case(AdapterConfig(name="lora")).network, BATCH_OF_REALITY, False)
    trained = operations(Case(AdapterConfig(name="full")).network, BATCH_OF_REALITY, False)
    assert frozen.backward < 1.25 * frozen.forward
    assert trained.backward == pytest.approx(2 * trained.forward, rel=0.01)


def one_layer(rank: int, inputs: int, outputs: int) -> Network:
    """Nothing but one adapted linear layer, in the middle of a model."""
    update = Update(
        rank,
        8,
        dropout=False,
        fused=False,
        routed=False,
        conditional=False,
        router_width=None,
        routers_learn=False,
    )
    return Network(
        num_layers=1,
        linears=(Linear("down_proj", inputs, outputs, adapted=True),),
        hidden=0,
        intermediate=0,
        attention=0,
        num_heads=0,
        vocabulary=0,
        image_tokens=0,
        tower_parameters=0,
        tower_tokens=0,
        tower_width=0,
        projector_parameters=0,
        trains_base=False,
        trains_projector=False,
        update=update,
        eager_attention=True,
    )


@pytest.mark.parametrize("dense", [False, True])
def test_a_layer_the_thin_way_and_by_forming_ba(dense: bool) -> None:
    instances, length, rank, inputs, outputs = 3, 20, 4, 32, 24
    hidden = torch.randn(instances, length, inputs, requires_grad=True)
    weight = torch.randn(outputs, inputs)
    rows_a = torch.randn(instances, rank, inputs, requires_grad=True)
    rows_b = torch.randn(instances, rank, outputs, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        if dense:
            update = torch.bmm(hidden, torch.bmm(rows_b.transpose(1, 2), rows_a).transpose(1, 2))
        else:
            update = torch.bmm(torch.bmm(hidden, rows_a.transpose(1, 2)), rows_b)
        loss = (hidden @ weight.T + update).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    predicted = operations(
        one_layer(rank, inputs, outputs), Batch(instances, length, 0), checkpointing=False, dense=dense
    )
    assert predicted.forward == forward.get_total_flops()
    assert predicted.backward == backward.get_total_flops()


def test_forming_ba_more_than_doubles_the_cost_of_a_large_layer() -> None:
    """Beside the layer's product, its input gradient and the recomputation: twice its product forward, twice back."""
    thin, dense = (
        operations(one_layer(4, 4096, 4096), Batch(8, 500, 0), True, dense=way).total for way in (False, True)
    )
    assert dense / thin == pytest.approx(7 / 3, rel=0.03)
