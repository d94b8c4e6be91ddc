"""What the tensors of a published checkpoint are, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from mixlora_cli.errors import UserError
from mixlora_cli.prepare.published.files import TensorFile

# "loarB" is the published spelling.
_ROUTERS = {
    "cmoa_selector.loraA_selector.weight": "router_a",
    "cmoa_selector.loraB_selector.weight": "router_b",
    "cmoa_loarB_extra_selector.loraB_selector.weight": "conditional_router_b",
    "cmoa_loarB_extra_selector.loraA_param2loraB_selector.weight": "router_ab",
}
_MARKS = ("lora_", "cmoa_selector.", "cmoa_loarB_extra_selector.", "mixlora", "mm_projector.")
_LAYER = re.compile(
    r"(?:module\.)?(?:base_model\.model\.)?model\.layers\.(\d+)\.((?:self_attn|mlp)\.\w+)\.(.+)"
)
_BASE = re.compile(r"(?:^|\.)model\.layers\.(\d+)\.")
# A file of PEFT's own leaves out the adapter's name, which is always "default".
_FACTOR = re.compile(r"lora_([AB])\.(?:default\.)?(\d+)")
_PLAIN_LORA = re.compile(r"\.lora_(?:[AB]|embedding_[AB])(?:\.\w+)?(?:\.weight)?$")
_PROJECTOR = re.compile(r"(?:.*\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)")


class Place(NamedTuple):
    """A linear layer of the language model."""

    layer: int
    linear: str
    """Such as "self_attn.q_proj"."""

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.linear}"


@dataclass
class AdaptedLinear:
    """What a checkpoint has for one linear layer, in the published shapes."""

    factors_a: dict[int, Tensor] = field(default_factory=dict)
    """By number: (1, d_in)."""
    factors_b: dict[int, Tensor] = field(default_factory=dict)
    """By number: (1, d_out)."""
    routers: dict[str, Tensor] = field(default_factory=dict)
    """router_a and router_b or conditional_router_b (E, width), router_ab (E, r * d_in)."""


@dataclass
class Published:
    """The trained part of a checkpoint."""

    linears: dict[Place, AdaptedLinear] = field(default_factory=dict)
    projector: dict[tuple[int | None, str], Tensor] = field(default_factory=dict)
    """By position in a sequence (None: the projector is one linear layer) and "weight" or "bias"."""
    projector_file: str | None = None
    main_file: str = ""
    base_layers: int | None = None
    """Decoder layers of the frozen base, where its tensors lie beside the adapter's."""


def wanted(name: str) -> bool:
    """Whether a tensor belongs to the adapter or the projector; the frozen base's do not."""
    return any(mark in name for mark in _MARKS)


def sort_tensors(files: Sequence[TensorFile]) -> Published:
    """Put every tensor in its place; what an earlier file has, a later one does not replace.

    Raises:
        UserError: there is no adapter, or a tensor that the published code's supported settings do not make.
    """
    layers = [int(found[1]) for file in files for name in file.others if (found := _BASE.search(name))]
    published = Published(main_file=files[0].name, base_layers=max(layers) + 1 if layers else None)
    for file in files:
        own_projector: dict[tuple[int | None, str], Tensor] = {}
        for name, tensor in file.tensors.items():
            if tensor.numel() == 0:
                raise UserError(
                    f"{file.name}: {name} is empty, the checkpoint was saved without gathering its shards (ZeRO-3); "
                    "run DeepSpeed's zero_to_fp32.py on the original folder and import the result"
                )
            projector = _PROJECTOR.fullmatch(name)
            if projector is not None:
                position = None if projector.group(1) is None else int(projector.group(1))
                own_projector[position, projector.group(2)] = tensor
            else:
                _sort_adapter(published, file.name, name, tensor)
        if own_projector and not published.projector:
            published.projector, published.projector_file = own_projector, file.name
    if not published.linears:
        others = sum(len(file.others) + len(file.tensors) for file in files)
        raise UserError(
            f"{files[0].name}: no factors among its {others} tensors (names such as "
            "...q_proj.lora_A.default.0); is it a model tuned without MixLoRA?"
        )
    return published


def _sort_adapter(published: Published, file: str, name: str, tensor: Tensor) -> None:
    layer = _LAYER.fullmatch(name)
    if layer is None or not _is_part(layer.group(3)):
        raise UserError(f"{file}: {name}: {_why_not(name)}")
    linear = published.linears.setdefault(Place(int(layer.group(1)), layer.group(2)), AdaptedLinear())
    factor = _FACTOR.fullmatch(layer.group(3))
    if factor is None:
        linear.routers.setdefault(_ROUTERS[layer.group(3)], tensor)
    else:
        pool = linear.factors_a if factor.group(1) == "A" else linear.factors_b
        pool.setdefault(int(factor.group(2)), tensor)


def _is_part(rest: str) -> bool:
    return rest in _ROUTERS or _FACTOR.fullmatch(rest) is not None


def _why_not(name: str) -> str:
    """Why a tensor of an adapter cannot be imported."""
    if "mixlora_" in name:
        return "this is an adapter of mixlora itself; use it as it is: mixlora eval run=FOLDER"
    if "mixlora" in name or ".experts." in name:
        return "this is another method that is called MixLoRA (experts behind a gate), which mixlora does not have"
    if "mm_projector" in name:
        return "the projector itself is adapted (mix_mm_projector=True), which mixlora does not have"
    if "loraA_choice" in name:
        return "B is selected by the numbers of A's factors (lora_a_choice), which mixlora does not have"
    if _PLAIN_LORA.search(name):
        return "this is plain LoRA, not MixLoRA; a PEFT folder can be used as it is: mixlora eval run=FOLDER"
    return "expected only factors and selectors of the language model's linear layers, as the published code saves them"
