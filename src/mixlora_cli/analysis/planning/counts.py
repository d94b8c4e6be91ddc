"""Parameters by what they are, counted on a model on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

# The first part that a parameter's name contains decides; what contains none belongs to the language model.
_PARTS = (
    ("mixlora_factors", "factors"),
    ("lora_A", "factors"),
    ("lora_B", "factors"),
    ("mixlora_router", "routers"),
    ("multi_modal_projector", "projector"),
    ("vision_tower", "vision tower"),
)
KINDS = ("factors", "routers", "projector", "vision tower", "language model")


@dataclass(frozen=True)
class Count:
    """Parameters of one kind."""

    kind: str
    trained: int
    frozen: int


def count_parameters(model: nn.Module) -> tuple[Count, ...]:
    """One `Count` for each kind that the model has; a shared parameter counts once."""
    trained = dict.fromkeys(KINDS, 0)
    frozen = dict.fromkeys(KINDS, 0)
    for name, parameter in model.named_parameters():
        side = trained if parameter.requires_grad else frozen
        side[kind_of(name)] += parameter.numel()
    return tuple(Count(kind, trained[kind], frozen[kind]) for kind in KINDS if trained[kind] + frozen[kind])


def kind_of(name: str) -> str:
    """Kind of the parameter with this dotted name."""
    return next((kind for part, kind in _PARTS if part in name), "language model")


def num_trained(counts: Iterable[Count]) -> int:
    """Parameters that training changes."""
    return sum(count.trained for count in counts)


def num_frozen(counts: Iterable[Count]) -> int:
    """Parameters that stay as they are."""
    return sum(count.frozen for count in counts)
