"""`train.compile=true` trains what training without it trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from mixlora_cli.config import RoutingConfig
from mixlora_cli.training.run_folder import RunFolder, read_metrics
from mixlora_cli.training.train import train

from .conftest import MakeConfig, adapter_weights


def test_a_compiled_language_model_trains_alike(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the passes that look at the routing; graphs are made, but not translated, which takes minutes."""
    compiled: list[nn.Module] = []

    def make_graphs_alone(module: nn.Module, *_: Any, **__: Any) -> None:
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", make_graphs_alone)
    counters.clear()
    found = []
    for name, switch in (("plain", False), ("compiled", True)):
        config = make_config(name, steps=3, compile=switch)
        adapter = replace(config.adapter, pairing="tied", dropout=0.0)  # whose draws would differ
        routing = RoutingConfig("instance", pool="text", normalize=True, router_init="tasks", health_every=2)
        found.append(train(replace(config, adapter=adapter, routing=routing)))
    plain, other = (
        ([row["loss"] for row in read_metrics(RunFolder(root).metrics)], adapter_weights(root))
        for root in found
    )
    assert len(compiled) == 1 and counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert other[0] == pytest.approx(plain[0], abs=1e-5)
    assert plain[0][-1] != plain[0][0]
    for name, weight in plain[1].items():
        torch.testing.assert_close(other[1][name], weight, rtol=1e-3, atol=1e-5, msg=name)
