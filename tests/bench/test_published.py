"""The whole model in the published form is the same method: its numbers are ours where nothing depends on padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixlora_cli.analysis.bench.published import PublishedLayer, into_published_form

from mixlora_cli.analysis.bench.whole import WholeModel
from mixlora_cli.method.layer import MixLoraLayer


@pytest.mark.slow
def test_every_layer_is_replaced_and_the_logits_stay(make_config: Any) -> None:
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
