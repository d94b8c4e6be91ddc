"""Several adapters on one model: added one after the other, and each row of a batch with its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_models import (
    MECHANISMS,
    adapt,
    batch,
    build_llama,
    build_llava,
    calibrate,
    generate,
    logits,
    prompt,
    strengthen,
)
from torch import Tensor

from mixlora_cli import MixLoraConfig
from mixlora_cli.method.layer import MixLoraLayer

KINDS: dict[str, dict[str, Any]] = {
    "default": {"r": 2, "factors": 8},
    "second": {"r": 3, "factors": 5, "cfs": "none", "alpha": 4.0},
    "third": {"r": 2, "factors": 6, "routing": "random"},
    "fourth": {"r": 2, "factors": 6, **MECHANISMS["plus"]},
    "fifth": {"factors": 6, **MECHANISMS["block"], "r": 3},
}


@pytest.fixture(scope="module")
def model() -> Any:
    adapted = adapt(build_llava(), **KINDS["default"])
    for name in [*KINDS][1:]:
        adapted.add_adapter(name, MixLoraConfig(**KINDS[name]))
    strengthen(adapted)
    calibrate(adapted)
    return adapted.eval()


def of_row(model: Any, name: str, row: int, seeds: Tensor, read: Any, **options: Any) -> Tensor:
    """What a single prompt gives with a single adapter."""
    inputs = batch([prompt(3 + 2 * row, row)])
    if name == "__base__":
        with model.disable_adapter():
            return read(model, inputs, routing_seeds=None, **options)
    model.set_adapter(name)
    return read(model, inputs, routing_seeds=seeds[row : row + 1], **options)


def last_logits(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return logits(model, inputs, **options)[:, -1]


@pytest.mark.parametrize(
    "names",
    [
        ["second", "__base__", "default", "third"],
        ["default", "default", "__base__", "second"],
        ["__base__"] * 4,
        ["third"] * 4,
        ["fourth", "fifth", "default", "fourth"],
        ["fifth", "__base__", "fifth", "third"],
    ],
)
@pytest.mark.parametrize("active", ["default", "second"])
def test_each_row_is_answered_by_its_own_adapter(model: Any, names: list[str], active: str) -> None:
    inputs = batch([prompt(3 + 2 * row, row) for row in range(4)])
    seeds = torch.arange(4) * 2**50 + 3
    model.set_adapter(active)
    together = last_logits(model, inputs, adapter_names=names, routing_seeds=seeds)
    generated = {
        options: generate(model, inputs, adapter_names=names, routing_seeds=seeds, **dict(options))
        for options in ((), (("use_cache", False),), (("num_beams", 3),))
    }
    for row, name in enumerate(names):
        alone = of_row(model, name, row, seeds, last_logits)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)
        for options, found in generated.items():
            assert torch.equal(found[row], of_row(model, name, row, seeds, generate, **dict(options))[0])


def test_what_is_refused_as_lora_refuses_it(model: Any) -> None:
    inputs = batch([prompt(3, 0), prompt(5, 1)])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        last_logits(model, inputs, adapter_names=["default", "nobody"])
    with pytest.raises(
        ValueError, match="Length of `adapter_names` should be the same as the number of inputs"
    ):
        last_logits(model, inputs, adapter_names=["default"])
    model.train()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        last_logits(model, inputs, adapter_names=["default", "default"])
    model.eval()
    model.set_adapter("default")
    before = last_logits(model, inputs)
    assert torch.equal(before, last_logits(model, inputs))


def test_adapters_added_by_transformers_share_one_context() -> None:
    """`add_adapter` makes a tuner for each; generation with either is as if it were the only one."""
    model = build_llama()
    ids = torch.randint(4, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    expected = {}
    for name in ("default", "second"):
        alone = build_llama()
        torch.manual_seed(1)
        alone.add_adapter(MixLoraConfig(**KINDS[name]), name)
        strengthen(alone, name=name)
        expected[name] = generate(alone, {"input_ids": ids, "attention_mask": mask})
        torch.manual_seed(1)
        model.add_adapter(MixLoraConfig(**KINDS[name]), name)
        strengthen(model, name=name)
    contexts = {id(layer.context) for layer in model.modules() if isinstance(layer, MixLoraLayer)}
    assert len(contexts) == 1
    assert not torch.equal(expected["default"], expected["second"])
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        for use_cache in (True, False):
            found = generate(model, {"input_ids": ids, "attention_mask": mask}, use_cache=use_cache)
            assert torch.equal(found, expected[name])
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(generate(model, {"input_ids": ids, "attention_mask": mask}), expected["second"])


def test_modules_trained_whole_follow_their_rows_adapter() -> None:
    """As LoRA does it: each row's own head."""
    model = adapt(build_llama(), modules_to_save=["lm_head"])
    model.add_adapter("second", MixLoraConfig(r=2, factors=8, modules_to_save=["lm_head"]))
    strengthen(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.second" in name:
                parameter.mul_(-1.5)
    model.eval()
    ids = torch.randint(4, 64, (1, 6), generator=torch.Generator().manual_seed(0)).expand(3, -1)
    mixed = last_logits(model, {"input_ids": ids}, adapter_names=["second", "default", "__base__"])
    for row, name in enumerate(("second", "default")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], last_logits(model, {"input_ids": ids[:1]})[0])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[2], last_logits(model, {"input_ids": ids[:1]})[0])
