"""Predicted activation bytes against what autograd really saves."""

import pytest
from planning_reality import BATCH, LABELS, LENGTH, VOCABULARY, Case

from mixlora_cli.analysis.planning.activations import Numerics, activations, saved_by_decoder
from mixlora_cli.analysis.planning.operations import Batch
from mixlora_cli.config import AdapterConfig

BATCH_OF_REALITY = Batch(BATCH, LENGTH, LABELS)
LOG_PROBABILITIES = BATCH * LABELS * VOCABULARY * 4
TOLERANCE = 0.03


def numerics_here(adapter: str, bf16: bool) -> Numerics:
    """On a CPU, where a dropout mask has the type of the activations."""
    element = 2 if bf16 else 4
    return Numerics(element, residual=4 if adapter == "full" else element, dropout_mask=element)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("adapter", "dropout"),
    [("lora", 0.05), ("lora", 0.0), ("mixlora", 0.05), ("mixlora", 0.0), ("full", 0.0)],
)
def test_bytes_are_those_that_autograd_saves(
    adapter: str, dropout: float, attention: str, bf16: bool
) -> None:
    case = Case(AdapterConfig(name=adapter, dropout=dropout), attention, bf16=bf16)  # type: ignore[arg-type]
    predicted = saved_by_decoder(case.network, BATCH_OF_REALITY, numerics_here(adapter, bf16))
    if adapter == "full" and bf16:
        # Autocast's copies of the weights, which the plan counts as weights.
        layers = case.network.num_layers
        predicted += 2 * layers * sum(linear.products for linear in case.network.linears)
    assert predicted + LOG_PROBABILITIES == pytest.approx(case.saved_bytes(), rel=TOLERANCE)


@pytest.mark.parametrize("adapter", ["lora", "mixlora"])
def test_checkpointing_keeps_the_stream_between_layers(adapter: str) -> None:
    case = Case(AdapterConfig(name=adapter), checkpointing=True)  # type: ignore[arg-type]
    predicted = activations(case.network, BATCH_OF_REALITY, numerics_here(adapter, False), True)
    assert predicted.kept + LOG_PROBABILITIES == pytest.approx(case.saved_bytes(), rel=TOLERANCE)


def test_checkpointing_pays_more_the_more_layers_there_are() -> None:
    network = Case(AdapterConfig(name="mixlora")).network
    numerics = Numerics(2, 2)
    with_it = activations(network, BATCH_OF_REALITY, numerics, True)
    without = activations(network, BATCH_OF_REALITY, numerics, False)
    assert with_it.kept < 0.2 * without.kept
    assert with_it.total < without.total
    assert with_it.logits == without.logits
