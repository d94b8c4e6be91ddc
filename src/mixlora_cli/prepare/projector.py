"""LLaVA-v1's published projector: one linear layer in `mm_projector.bin`."""

from __future__ import annotations

from torch import Tensor

from mixlora_cli.prepare.parts import Part
from mixlora_cli.prepare.weights import read_file

FILE = "mm_projector.bin"
_PREFIXES = ("model.mm_projector.", "mm_projector.")


def read_projector(part: Part, in_features: int, out_features: int) -> dict[str, Tensor]:
    """`weight` (out_features, in_features) and `bias` (out_features,).

    Args:
        part: the file, or a folder that holds it.
        in_features: width of the vision tower.
        out_features: width of the language model.

    Raises:
        UserError: there is no such file, or it is not one linear layer between these two models.
    """
    file = part.path / FILE if part.path.is_dir() else part.path
    if not file.is_file():
        raise part.refuse(
            f"{FILE} is not in this folder; give the folder or the file of the published projector"
        )
    values = {_plain_name(name): tensor for name, tensor in read_file(part, file).items()}
    if any("embed_tokens" in name for name in values):
        raise part.refuse(
            "this projector comes with token embeddings: it was trained with special tokens around the picture "
            "(mm_use_im_start_end), which no template here has"
        )
    if any(name.split(".")[0].isdigit() for name in values):
        raise part.refuse(
            "this projector has several layers, as LLaVA-1.5's; LLaVA-v1 has one linear layer. "
            "For LLaVA-1.5 use model=llava_1_5_7b, which needs no preparation"
        )
    if set(values) != {"weight", "bias"}:
        names = ", ".join(sorted(values)[:4]) or "nothing"
        raise part.refuse(f"expected mm_projector.weight and mm_projector.bias, found {names}")
    shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
    if shapes != {"weight": (out_features, in_features), "bias": (out_features,)}:
        found = " and ".join(f"{name} {shapes[name]}" for name in ("weight", "bias"))
        raise part.refuse(
            f"found {found}, but the vision tower's {in_features} features go to the language model's {out_features}: "
            "it was trained with other models than these"
        )
    return values


def _plain_name(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name
