"""From the published tensors to those of a mixlora adapter folder."""

from __future__ import annotations

import torch
from torch import Tensor

from mixlora_cli.errors import UserError
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.prepare.published.names import AdaptedLinear, Place, Published

_PREFIX = "base_model.model.model."
"""Of all names in a PEFT folder whose base is a LLaVA of transformers."""


def convert(published: Published, config: MixLoraConfig) -> dict[str, Tensor]:
    """Names and shapes of `adapter_model.safetensors`; numbers and their types stay as they are.

    Raises:
        UserError: the projector is not one that the bases here have.
    """
    weights = convert_projector(published)
    for place, linear in sorted(published.linears.items()):
        for kind, tensor in _convert_linear(linear, config).items():
            weights[_name(place, kind)] = tensor
    return weights


def _name(place: Place, kind: str) -> str:
    return f"{_PREFIX}language_model.{place}.mixlora_{kind}.weight"


def _convert_linear(linear: AdaptedLinear, config: MixLoraConfig) -> dict[str, Tensor]:
    """factors_a (E, d_in), factors_b (E, d_out), router_a and router_b (E, width), router_ab (r, d_in, E)."""
    parts = {
        "factors_a": torch.cat([linear.factors_a[number] for number in range(config.factors)]),
        "factors_b": torch.cat([linear.factors_b[number] for number in range(config.factors)]),
    }
    routers = dict(linear.routers)
    if "router_ab" in routers:
        parts["router_ab"] = unfold_router_ab(routers.pop("router_ab"), config.r)
        routers["router_b"] = routers.pop("conditional_router_b")
    return {name: tensor.contiguous().clone() for name, tensor in (parts | routers).items()}


def unfold_router_ab(weight: Tensor, rank: int) -> Tensor:
    """(E, r * d_in), the columns of A's first selected factor before the second's -> W_AB (r, d_in, E) of Eq. 7."""
    return weight.reshape(len(weight), rank, -1).permute(1, 2, 0)


def convert_projector(published: Published) -> dict[str, Tensor]:
    """`mm_projector` as one linear layer (LLaVA-v1) or two (LLaVA-1.5) -> `linear_1`, `linear_2`.

    Raises:
        UserError: it has other layers, or shapes that do not fit together.
    """
    if not published.projector:
        return {}
    file = published.projector_file
    positions = sorted(
        {position for position, _ in published.projector}, key=lambda p: -1 if p is None else p
    )
    if positions not in ([None], [0, 2]):
        raise UserError(
            f"{file}: the projector has layers {', '.join(str(p) for p in positions)}; expected one linear layer "
            "(LLaVA-v1) or layers 0 and 2 (LLaVA-1.5)"
        )
    missing = [p for p in positions if (p, "weight") not in published.projector]
    if missing:
        raise UserError(f"{file}: the projector has a bias but no weight; the checkpoint is not complete")
    _check_projector(published, [published.projector[position, "weight"] for position in positions])
    return {
        f"{_PREFIX}multi_modal_projector.linear_{positions.index(position) + 1}.{kind}": tensor.contiguous().clone()
        for (position, kind), tensor in published.projector.items()
    }


def _check_projector(published: Published, layers: list[Tensor]) -> None:
    file = published.projector_file
    for layer in published.projector.values():
        if not layer.is_floating_point() or not torch.isfinite(layer).all():
            raise UserError(f"{file}: the projector's values are not all finite floating-point numbers")
    if any(layer.dim() != 2 for layer in layers):
        raise UserError(f"{file}: a weight of the projector is no matrix; the checkpoint is not complete")
    if len(layers) == 2 and layers[0].shape[0] != layers[1].shape[1]:
        raise UserError(
            f"{file}: the projector's layers do not fit: {tuple(layers[0].shape)}, {tuple(layers[1].shape)}"
        )
    attention = next((p for p in sorted(published.linears) if p.linear == "self_attn.q_proj"), None)
    if attention is not None:
        hidden_size = published.linears[attention].factors_a[0].shape[-1]
        if layers[-1].shape[0] != hidden_size:
            raise UserError(
                f"{file}: the projector makes {layers[-1].shape[0]} features, the language model has {hidden_size}"
            )
