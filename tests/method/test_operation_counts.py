"""MixLoRA's cost in operations and in memory for the backward pass, counted and held against LoRA's of the same rank.

No clock is read: these numbers follow from shapes alone and are the same on every machine.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model

from mixlora_cli.analysis.bench.counters import Operations, count_operations, saved_bytes
from mixlora_cli.analysis.bench.layers import (
    LINEAR,
    LORA,
    PUBLISHED,
    Bench,
    LayerCase,
    OneLayer,
    build_bench,
    mixlora,
)
from mixlora_cli.method.config import MixLoraConfig

D_IN, D_OUT, BATCH, TOKENS, RANK = 256, 192, 4, 32, 4
POOLS = [16, 64]
ALL_TOKENS = BATCH * TOKENS


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def bench(request: pytest.FixtureRequest) -> Bench:
    case = LayerCase(D_IN, D_OUT, request.param, BATCH, TOKENS, RANK)
    return build_bench(case, POOLS[0], POOLS, torch.device("cpu"))


def operations(bench: Bench, name: str) -> Operations:
    bench.clear(name)
    return count_operations(lambda: bench.forward(name), bench.gradient)


def kept(bench: Bench, name: str) -> int:
    return saved_bytes(lambda: bench.forward(name), bench.models[name])


def low_rank_operations() -> int:
    """B A h forward, and the gradients of A, B and h: the two thin products thrice."""
    return 3 * 2 * ALL_TOKENS * RANK * (D_IN + D_OUT)


def router_operations(num_factors: int) -> int:
    """W_A, W_B and the r slices of W_AB, once for each instance; frozen, so only forward."""
    return 2 * BATCH * D_IN * num_factors * (2 + RANK)


def test_the_counter_agrees_with_the_formulas_of_linear_and_lora(bench: Bench) -> None:
    frozen = 2 * ALL_TOKENS * D_IN * D_OUT
    assert operations(bench, LINEAR) == Operations(frozen, frozen)
    assert operations(bench, LORA).total == 2 * frozen + low_rank_operations()


@pytest.mark.parametrize("num_factors", POOLS)
def test_operations_are_loras_and_the_routers(bench: Bench, num_factors: int) -> None:
    more = operations(bench, mixlora(num_factors)).total - operations(bench, LORA).total
    # The mean over an instance's tokens may be written as a matrix product, and is counted then.
    pooling = 2 * ALL_TOKENS * D_IN
    assert 0 <= more - router_operations(num_factors) <= pooling


def test_a_larger_pool_costs_its_routers_alone(bench: Bench) -> None:
    few, many = (operations(bench, mixlora(pool)) for pool in POOLS)
    assert many.backward == few.backward
    assert many.forward - few.forward == router_operations(POOLS[1]) - router_operations(POOLS[0])


def test_keeps_what_lora_keeps_and_the_indices_of_the_factors(bench: Bench) -> None:
    size = bench.hidden.element_size()
    input_and_inner = ALL_TOKENS * (D_IN + RANK) * size
    casts = 0 if size == 4 else RANK * (D_IN + D_OUT) * size  # of LoRA's fp32 weights
    assert kept(bench, LINEAR) == 0
    assert kept(bench, LORA) == input_and_inner + casts
    assert kept(bench, mixlora(POOLS[0])) == input_and_inner + 2 * BATCH * RANK * torch.long.itemsize


MECHANISMS: dict[str, dict[str, Any]] = {
    "normalize": {"normalize": True, "router_init": "clusters"},
    "tied": {"pairing": "tied", "normalize": True},
}


@pytest.mark.parametrize("fields", MECHANISMS.values(), ids=MECHANISMS)
def test_ways_to_select_cost_their_routers_and_their_gradient_alone(
    bench: Bench, fields: dict[str, Any]
) -> None:
    """Whatever selects, and whatever it learns by: tokens go through LoRA's two thin products."""
    config = MixLoraConfig(
        r=RANK,
        factors=POOLS[0],
        target_modules=["proj"],
        cfs="none",
        router_grad="straight_through",
        **fields,
    )
    base = bench.models[LINEAR].proj
    model = get_peft_model(OneLayer(base), config).train()
    model.base_model.skip_calibration()
    more = replace(bench, models={**bench.models, "more": model})
    extra = operations(more, "more").total - operations(more, LORA).total
    # Two routers or one: forward, and the gradients of their weights and of what they read.
    routers = 1 if fields.get("pairing") == "tied" else 2
    pooling = 2 * ALL_TOKENS * D_IN
    assert 0 <= extra - 3 * 2 * BATCH * D_IN * POOLS[0] * routers <= 2 * pooling
    size = bench.hidden.element_size()
    # Beside the input and the r numbers a token: numbers of instances, and of E and d_in features of each.
    instances = BATCH * (4 * D_IN + 16 * POOLS[0]) * 8
    assert kept(more, "more") <= ALL_TOKENS * (D_IN + RANK) * size + instances


def test_what_is_kept_does_not_grow_with_the_pool(bench: Bench) -> None:
    few, many = (kept(bench, mixlora(pool)) for pool in POOLS)
    assert many == few


def test_the_published_form_costs_what_ours_avoids(bench: Bench) -> None:
    """A second full product and its two gradients, and the matrices that it keeps."""
    full = 2 * ALL_TOKENS * D_IN * D_OUT
    form = 3 * 2 * BATCH * RANK * D_IN * D_OUT  # multiplying out, and the gradients of its two sides
    expected = 2 * full + 3 * full + form + router_operations(POOLS[0])
    assert operations(bench, PUBLISHED).total == expected
    assert kept(bench, PUBLISHED) >= BATCH * D_IN * D_OUT * bench.hidden.element_size()
