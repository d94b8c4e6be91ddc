"""The parameters whose gradients are compared: A and B of each adapted layer, each a group of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from mixlora_cli.method.layer import MixLoraLayer

ADAPTER = "default"
Matrix = Literal["A", "B"]
_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Group:
    """One matrix of one adapted layer; for MixLoRA the pool of all its E factors."""

    layer: str
    """Name of the adapted linear layer in the base model."""
    matrix: Matrix

    @property
    def number(self) -> int | None:
        """Number of the transformer layer that it is in, counted from 0."""
        found = _NUMBER.search(self.layer)
        return None if found is None else int(found[1])

    @property
    def block(self) -> str:
        """The part of a transformer layer that it belongs to: "attention", "mlp" or "other"."""
        parts = self.layer.split(".")
        if any("attn" in part or "attention" in part for part in parts):
            return "attention"
        return "mlp" if "mlp" in parts else "other"

    @property
    def module(self) -> str:
        """Its own name there: "q_proj"."""
        return self.layer.rpartition(".")[2]

    @property
    def name(self) -> str:
        """Name that is unique in a model."""
        return f"{self.layer}.{self.matrix}"


@dataclass(frozen=True)
class Factors:
    """The groups of an adapted model and, in their order, the parameters."""

    groups: tuple[Group, ...]
    parameters: tuple[nn.Parameter, ...]
    """LoRA: A (r, d_in) and B (d_out, r). MixLoRA: A (E, d_in) and B (E, d_out)."""


def require_gradients(model: PeftModel) -> Factors:
    """Freeze everything but the factors of the adapter, which stay in fp32, and return these.

    Routers, and a projector that was trained too, are shared by all tasks but are no factors: they stay frozen.
    """
    model.requires_grad_(False)
    groups, parameters = [], []
    for name, module in model.named_modules():
        pair = _pair(module)
        for matrix, parameter in zip(("A", "B"), pair, strict=False):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            groups.append(Group(name.removeprefix(_PREFIX), "A" if matrix == "A" else "B"))
            parameters.append(parameter)
    return Factors(tuple(groups), tuple(parameters))


def _pair(module: nn.Module) -> Sequence[nn.Parameter]:
    """A and B of an adapted layer; nothing for other modules."""
    if isinstance(module, MixLoraLayer):
        pools = module.mixlora_factors_a, module.mixlora_factors_b
    elif isinstance(module, LoraLayer):
        pools = module.lora_A, module.lora_B
    else:
        return ()
    if ADAPTER not in pools[0]:
        return ()
    return [_weight(pool[ADAPTER]) for pool in pools]


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter) and isinstance(weight, torch.Tensor)
    return weight
