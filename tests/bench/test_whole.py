"""The whole model's forms share their frozen weights; the published one is the same method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mixlora_cli.analysis.bench.layers import PublishedLayer, into_published_form
from mixlora_cli.analysis.bench.whole import WholeModel, sharing_weights
from mixlora_cli.config import ModelConfig
from mixlora_cli.data.collate import PixelLoader
from mixlora_cli.method.layer import MixLoraLayer
from mixlora_cli.models.tiny import build_tiny


@pytest.mark.slow
def test_in_the_published_form_every_layer_is_replaced_and_the_logits_stay(make_config: Any) -> None:
    whole = WholeModel(make_config(), torch.device("cpu"))
    ours, published = whole.adapted("mixlora"), whole.adapted("mixlora")
    into_published_form(published)
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, MixLoraLayer)}
    replaced = {name: layer for name, layer in published.named_modules() if isinstance(layer, PublishedLayer)}
    assert replaced.keys() == layers.keys() and len(layers) > 1
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, layer in layers.items():
            for parameter_name, parameter in layer.named_parameters():
                if "mixlora_" in parameter_name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
                    target = parameter_name.removeprefix("mixlora_").replace(".default", "")
                    replaced[name].get_parameter(target).copy_(parameter)
    ids = torch.randint(5, 40, (1, 9), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        expected, found = (model.eval()(**inputs).logits for model in (ours, published))
        untrained = whole.base.model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - untrained).abs().max() > 1e-2


def test_models_share_the_frozen_weights_and_nothing_else(make_config: Any) -> None:
    whole = WholeModel(make_config(), torch.device("cpu"))
    _ = whole.features  # wraps the tower
    before = {name: tensor.clone() for name, tensor in whole.base.model.state_dict().items()}
    lora, mixlora = whole.step("lora", 2), whole.step("mixlora", 2)
    losses = [(lora(), mixlora()) for _ in range(3)]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-5)  # untrained, on the same batch
    assert losses[2][0] != losses[2][1]
    assert {name for name, _ in whole.base.model.named_modules() if "lora" in name} == set()
    for name, tensor in whole.base.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    own = {tensor.data_ptr() for tensor in whole.base.model.parameters()}
    assert own <= {tensor.data_ptr() for tensor in lora.model.parameters()}
    trained = [p.data_ptr() for step in (lora, mixlora) for p in step.model.parameters() if p.requires_grad]
    assert len(trained) == len(set(trained)) and not own & set(trained)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"], indirect=True)
def test_a_family_without_features_to_keep_is_measured_on_pixels(
    family: ModelConfig, make_config: Any
) -> None:
    whole = WholeModel(replace(make_config(), model=family), torch.device("cpu"))
    assert isinstance(whole.features, PixelLoader)
    lora, mixlora = whole.step("lora", 2), whole.step("mixlora", 2)
    losses = [(lora(), mixlora()) for _ in range(2)]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-5)
    prompts = whole.prompts(3)
    base, adapted = (whole.generator(name, 3)(prompts) for name in ("none", "mixlora"))
    assert base == adapted and len(base) == 3


def test_sharing_weights_copies_modules() -> None:
    model = build_tiny().model
    twin = sharing_weights(model)
    assert twin is not model and type(twin) is type(model)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert {id(module) for module in twin.modules()}.isdisjoint(id(module) for module in model.modules())
