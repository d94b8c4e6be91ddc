"""The method on a GPU: tests of its other files once more, and what only another device can show.

MIXLORA_TEST_DEVICE names the device (cuda without it); `MIXLORA_TEST_DEVICE=cpu pytest -m gpu` tries the tests
themselves where there is no GPU.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import method_oracle as oracle
import pytest
import torch
from method_models import (
    MECHANISMS,
    adapt,
    assert_close,
    batch,
    build_llama,
    build_llava,
    gradients,
    logits,
    padded,
    texts,
)
from test_checkpointing import (
    loss_of,
    test_gradients_are_those_without_checkpointing,
    test_two_forward_passes_before_one_backward,
)
from test_compile import one_graph_with_the_same_outputs_and_gradients
from test_generation import (
    test_cache_and_batch_change_no_token,
    test_decoding_by_hand_with_interleaved_caches,
    test_seeded_draws_are_an_instances_own,
    test_the_prompts_selection_stays_for_the_answer,
)
from test_invariance import (
    selections,
    test_padding_and_neighbours_change_nothing,
    test_random_routing_repeats_with_the_seed_and_is_distinct,
)
from test_lowrank import test_autocast_computes_the_product_in_bf16_and_selects_as_without
from test_oracle import (
    ALPHA,
    D_IN,
    D_OUT,
    MASKS,
    NAMES,
    NUM_FACTORS,
    RANK,
    build,
    inputs,
    test_forward_and_gradients_equal_the_oracle,
)
from torch import Tensor, nn

from mixlora_cli.method.forward_info import ForwardInfo

__all__ = [
    "test_autocast_computes_the_product_in_bf16_and_selects_as_without",
    "test_cache_and_batch_change_no_token",
    "test_decoding_by_hand_with_interleaved_caches",
    "test_forward_and_gradients_equal_the_oracle",
    "test_gradients_are_those_without_checkpointing",
    "test_padding_and_neighbours_change_nothing",
    "test_random_routing_repeats_with_the_seed_and_is_distinct",
    "test_seeded_draws_are_an_instances_own",
    "test_the_prompts_selection_stays_for_the_answer",
    "test_two_forward_passes_before_one_backward",
]
pytestmark = pytest.mark.gpu


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """In the place of the CPU of `conftest.py`; fp32 means fp32, in convolutions too."""
    device = torch.device(os.environ.get("MIXLORA_TEST_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU that torch can use")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return device


@pytest.mark.parametrize("cfs", ["paper", "released", "none"])
@pytest.mark.parametrize("base", ["fused", "called"])
def test_a_bf16_layer_is_near_the_oracle(device: torch.device, cfs: str, base: str) -> None:
    """Factors and routers in fp32, as in training; the same selections, and all numbers within bf16's rounding."""
    p = oracle.parameters(D_IN, D_OUT, NUM_FACTORS, RANK, seed=11)
    p.weight = p.weight.bfloat16().float()
    hidden, probe = (values.bfloat16().float() for values in inputs(12))
    loop_input = hidden.clone().requires_grad_()
    result = oracle.layer(p, loop_input, MASKS["left"], RANK, ALPHA, cfs)
    wanted = {name: getattr(p, name) for name in NAMES} | {"hidden": loop_input}
    expected = oracle.gradients(result, probe, wanted, straight_through=True)
    expected["output"] = torch.stack(
        [torch.stack([torch.stack(row) for row in rows]) for rows in result.output]
    )
    layer = build(p, cfs=cfs, router_grad="straight_through").to(device)
    layer.base_layer.bfloat16()
    if base == "called":
        layer.base_layer.register_forward_hook(lambda *_: None)
    read = hidden.to(device, torch.bfloat16).requires_grad_()
    with layer.context.within(ForwardInfo(tokens=MASKS["left"].to(device))):
        output = layer(read)
    (output * probe.to(device)).sum().backward()
    chosen = layer.last_selection["default"]
    assert (chosen.index_a.tolist(), chosen.index_b.tolist()) == (result.index_a, result.index_b)
    found = {name: p.grad for name, p in layer.named_parameters()}
    found = {field: found.get(name) for field, name in NAMES.items()} | {
        "hidden": read.grad,
        "output": output,
    }
    assert output.dtype == torch.bfloat16
    for name, value in expected.items():
        if value is None:
            assert found[name] is None
        else:
            error = (found[name].float().cpu() - value).abs().max() / value.abs().max()
            assert error < 0.02, name


@pytest.mark.parametrize("fields", [{}, {"cfs": "released"}, {"routing": "task"}, *MECHANISMS.values()])
def test_factors_logits_and_gradients_are_the_cpus(
    device: torch.device, prompts: Any, fields: dict[str, Any]
) -> None:
    extra = {"prompt_mask": torch.arange(13).expand(3, -1) < 10}
    if fields.get("routing") == "task":
        extra["task_embeddings"] = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for place in (torch.device("cpu"), device):
        model: Any = adapt(build_llava(), **fields).to(place)
        scores = logits(model, batch(prompts), **extra)
        chosen = selections(model)
        loss_of(model.train(), batch(prompts), **extra).backward()
        found.append([{"logits": scores}, chosen, gradients(model)])
    for expected, values in zip(*found, strict=True):
        on_cpu = {name: value.cpu() for name, value in values.items()}
        assert_close(on_cpu, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, MECHANISMS["plus"]], ids=["paper", "plus"])
def test_torch_compile_gives_the_same(make_model: Any, fields: dict[str, Any]) -> None:
    """Through the kernels that torch writes for the device."""
    one_graph_with_the_same_outputs_and_gradients(make_model(**fields).train(), "inductor", **fields)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_bits_give_what_the_weights_they_stand_for_give(
    device: torch.device, checkpointing: bool
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    plain = build_llama(
        hidden_size=64, intermediate_size=128, head_dim=16
    )  # blocks of 64 numbers have one scale
    coded = copy.deepcopy(plain)
    for name, linear in list(plain.model.named_modules()):
        if isinstance(linear, nn.Linear):
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32
            )
            layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            coded.model.set_submodule(name, layer.to(device))
            codes = layer.weight
            linear.weight.data = bnb.functional.dequantize_4bit(codes.data, codes.quant_state).float().cpu()
    found: list[dict[str, Tensor]] = []
    for base in (plain, coded):
        model: Any = adapt(base.to(device), router_grad="straight_through").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        loss_of(model, padded(texts(), "right")).backward()
        found.append(selections(model) | gradients(model))
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
