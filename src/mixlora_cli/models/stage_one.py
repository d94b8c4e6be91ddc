"""The result of stage one as one small file: the projector, and the low-rank update of the language model.

Matrices are stored as int8 with one fp32 scale a row (largest magnitude -> 127), vectors in fp32: a few MB that
everybody starts from. The file's metadata names the configuration, the seed and the commit that made it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixlora_cli.errors import UserError

ASSET = Path(__file__).parent / "assets" / "mini_stage_one.safetensors"
_PROJECTOR, _UP, _DOWN = "projector.", "update.up.", "update.down."

Update = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StageOne:
    """What stage one trained."""

    projector: dict[str, Tensor]
    """State of `multi_modal_projector`."""
    update: Update
    """Module of the language model -> (up (d_out, r), down (r, d_in)); their product, scale included, is added to
    its weight."""
    metadata: dict[str, str]

    def save(self, path: Path) -> None:
        """Write the file; quantises."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.projector.items():
            _put(tensors, _PROJECTOR + name, value)
        for name, (up, down) in self.update.items():
            _put(tensors, _UP + name, up)
            _put(tensors, _DOWN + name, down)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata=self.metadata)
        partial.replace(path)


def load_stage_one(path: Path = ASSET) -> StageOne:
    """Read the file.

    Raises:
        UserError: it is not there, or is no safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no stage-one weights; make them with: mixlora align")
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file, not a dict)
            metadata = dict(file.metadata() or {})
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as stage-one weights ({error}); make them with: mixlora align"
        ) from error
    plain = {name: _get(stored, name) for name in stored if not name.endswith(".scale")}
    ups = {name.removeprefix(_UP): value for name, value in plain.items() if name.startswith(_UP)}
    return StageOne(
        projector={n.removeprefix(_PROJECTOR): v for n, v in plain.items() if n.startswith(_PROJECTOR)},
        update={name: (up, plain[_DOWN + name]) for name, up in ups.items()},
        metadata=metadata,
    )


def stacked(first: Update, then: Update) -> Update:
    """One update that is the sum of both, of the same modules; their ranks add up."""
    return {
        name: (torch.cat([first[name][0], up], dim=1), torch.cat([first[name][1], down], dim=0))
        for name, (up, down) in then.items()
    }


@cache
def stage_one_digest() -> str:
    """Twelve hex digits of the file that ships: other weights, other digits."""
    return hashlib.sha256(ASSET.read_bytes()).hexdigest()[:12]


def _put(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach().float().cpu()
    if value.ndim != 2:
        tensors[name] = value.contiguous()
        return
    scale = value.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    tensors[name] = torch.round(value / scale).to(torch.int8)
    tensors[f"{name}.scale"] = scale.contiguous()


def _get(tensors: dict[str, Tensor], name: str) -> Tensor:
    value = tensors[name]
    return value.float() * tensors[f"{name}.scale"] if value.dtype == torch.int8 else value
