"""Gradient checkpointing computes layers twice: the second time has to see what the first saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_models import MECHANISMS, assert_close, batch, beside, gradients
from torch import Tensor

from mixlora_cli.method.context import _threads


def loss_of(model: Any, inputs: dict[str, Tensor], **extra: Any) -> Tensor:
    inputs = beside(model, inputs | extra)
    return model(**inputs, use_cache=False).logits.float().log_softmax(-1)[..., 7].mean()


def check_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert len(one) >= 28
    assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert max(g.abs().max() for g in one.values()) > 1e-4


def enable(model: Any, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"router_grad": "straight_through"},
        {"routing": "random", "dropout": 0.3},
        {"pool": "prompt", "router_grad": "straight_through", "cfs": "released"},
        {"routing": "task", "router_grad": "straight_through"},
        {"routing": "task", "pairing": "tied", "router_grad": "straight_through"},
        *MECHANISMS.values(),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())) or "default",
)
def test_gradients_are_those_without_checkpointing(make_model, prompts, fields, use_reentrant) -> None:
    model = make_model(**fields).train()
    inputs = batch(prompts, side="right")
    extra = {"prompt_mask": torch.arange(inputs["input_ids"].shape[1]).expand(3, -1) < 7}
    if fields.get("routing") == "task":
        extra["task_embeddings"] = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(9)
    loss_of(model, inputs, **extra).backward()
    plain = gradients(model)
    enable(model, use_reentrant)
    torch.manual_seed(9)
    loss_of(model, inputs, **extra).backward()
    check_equal(gradients(model), plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_two_forward_passes_before_one_backward(make_model, prompts, use_reentrant) -> None:
    """Each pass's layers are computed again with that pass's own masks, whatever was read in between."""
    model = make_model(router_grad="straight_through").train()
    first, second = batch(prompts, side="right", extra=2), batch(prompts[::-1], extra=6)
    (loss_of(model, first) + 2 * loss_of(model, second)).backward()
    plain = gradients(model)
    enable(model, use_reentrant)
    (loss_of(model, first) + 2 * loss_of(model, second)).backward()
    check_equal(gradients(model), plain)


def test_switching_it_off_and_on_again_wraps_once(make_model, prompts) -> None:
    model = make_model().train()
    enable(model, False)
    for _ in range(3):
        loss_of(model, batch(prompts)).backward()
    layer = model.get_base_model().model.language_model.layers[0]
    function = layer._gradient_checkpointing_func
    assert type(function).__name__ == "_RestoringCheckpoint"
    assert type(function.checkpoint).__name__ != "_RestoringCheckpoint"
    model.base_model.context.detach()
    assert layer._gradient_checkpointing_func is function.checkpoint


def test_one_pooled_mean_for_each_distinct_input(make_model, prompts, monkeypatch) -> None:
    """q, k and v read one tensor, gate and up another: four means in a decoder layer of seven linears."""
    from mixlora_cli.method import context

    counted: list[int] = []
    plain = context.masked_mean

    def counting(hidden: Tensor, *rest: object) -> Tensor:
        counted.append(id(hidden))
        return plain(hidden, *rest)

    monkeypatch.setattr(context, "masked_mean", counting)
    model = make_model()
    with torch.no_grad():
        model(**batch(prompts))
    assert len(counted) == 2 * 4


def test_no_activation_outlives_the_pass(make_model, prompts) -> None:
    import gc
    import weakref

    model = make_model(router_grad="straight_through").train()
    alive: list[weakref.ref[Tensor]] = []
    layer = model.get_base_model().model.language_model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, args: alive.append(weakref.ref(args[0])))
    loss = loss_of(model, batch(prompts))
    assert _threads.own.frame is None
    del loss
    gc.collect()
    assert alive[0]() is None
