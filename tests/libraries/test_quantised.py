"""A base in four or eight bits: an answer's passes use the same factors in the type that the layers compute in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_models import adapt, build_llama
from peft import get_peft_model
from torch import Tensor, nn

from mixlora_cli import MixLoraConfig
from mixlora_cli.method.layer import MixLoraLinear

NEW = 8


def _in_the_place_of_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """As transformers does it when it loads: every linear layer of the decoder but the output layer."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            model.set_submodule(name, make(module))
    return model.eval().requires_grad_(False)


def nf4(model: nn.Module) -> Any:
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return layer.to("cpu")

    return _in_the_place_of_linears(model, make)


def int8(model: nn.Module) -> Any:
    """Without LLM.int8's outliers: which columns those are depends on all rows of a batch, in the base already."""
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=0.0
        )
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")

    return _in_the_place_of_linears(model, make)


def torchao_int8(model: nn.Module) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name,
    )
    return model.eval().requires_grad_(False)


KINDS = {"nf4": nf4, "int8": int8, "torchao_int8": torchao_int8}


def base(kind: str) -> Any:
    # Blocks of 64 numbers are what four bits are counted in.
    return KINDS[kind](build_llama(hidden_size=64, intermediate_size=128, head_dim=16))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prompts() -> dict[str, Tensor]:
    ids = torch.randint(4, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def own(model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, -NEW:].tolist()


def by_hand(model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    """One pass for the prompt and one a token, with the cache handed on."""
    mask, tokens = inputs["attention_mask"], []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(**inputs, position_ids=positions, use_cache=True)
        for step in range(NEW):
            token = output.logits[:, -1:].argmax(-1)
            tokens.append(token)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            output = model(
                input_ids=token,
                attention_mask=mask,
                position_ids=positions[:, -1:] + 1 + step,
                past_key_values=output.past_key_values,
            )
    return torch.cat(tokens, dim=1).tolist()


def with_merged_factors(kind: str, model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    """The reference: each prompt alone on a base with the matrix of its own factors added to every layer's output."""
    answers = []
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        with torch.no_grad():
            model(**alone)
        plain, handles = base(kind), []
        for name, selection in model.base_model.selections().items():
            layer = model.get_base_model().get_submodule(name)
            a = layer.mixlora_factors_a["default"].weight[selection.index_a[0]]
            b = layer.mixlora_factors_b["default"].weight[selection.index_b[0]]
            update = layer.rules["default"].scaling * b.T @ a

            def add(_: nn.Module, args: tuple[Tensor], output: Tensor, update: Tensor = update) -> Tensor:
                return output + args[0] @ update.T

            handles.append(plain.get_submodule(name).register_forward_hook(add))
        assert len(handles) == 14
        answers += own(plain, alone)
    return answers


def test_generate_equals_the_loop_by_hand_and_merged_factors(kind: str) -> None:
    model = adapt(base(kind))
    layer = next(m for m in model.modules() if isinstance(m, MixLoraLinear))
    assert type(layer.base_layer.weight) is not nn.Parameter
    inputs = prompts()
    answers = own(model, inputs)
    assert answers == by_hand(model, inputs)
    assert answers == with_merged_factors(kind, model, inputs)
    assert answers == own_without_cache(model, inputs)
    with model.disable_adapter():
        assert own(model, inputs) != answers


def own_without_cache(model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, use_cache=False)[:, -NEW:].tolist()


def test_it_learns_and_the_base_stays(kind: str) -> None:
    """A few steps of AdamW lower the loss; what the base computes stays as it was."""
    torch.manual_seed(0)
    model = get_peft_model(base(kind), MixLoraConfig(r=2, factors=4, router_grad="straight_through"))
    layer = next(m for m in model.modules() if isinstance(m, MixLoraLinear))
    probe = torch.randn(1, 1, 64)
    before = layer.base_layer(probe)
    ids = torch.randint(4, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert torch.equal(layer.base_layer(probe), before)


def test_saved_and_loaded_it_answers_alike(kind: str, tmp_path: Any) -> None:
    from peft import PeftModel

    model = adapt(base(kind))
    answers = own(model, prompts())
    model.save_pretrained(tmp_path)
    assert own(PeftModel.from_pretrained(base(kind), tmp_path).eval(), prompts()) == answers
