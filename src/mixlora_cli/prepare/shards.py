"""A checkpoint written shard by shard, so that no more than one shard need be in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from mixlora_cli.store import readable_as_usual

SHARD_BYTES = 4 * 10**9
INDEX = "model.safetensors.index.json"


def num_bytes(shapes: Mapping[str, Tensor]) -> int:
    """Size of tensors on disk; those of the meta device tell theirs too."""
    return sum(tensor.numel() * tensor.element_size() for tensor in shapes.values())


def write_shards(
    folder: Path,
    shapes: Mapping[str, Tensor],
    tensor: Callable[[str], Tensor],
    limit: int = SHARD_BYTES,
) -> None:
    """Write `model*.safetensors` and, for several, their index.

    Args:
        shapes: every tensor of the checkpoint, on the meta device, in its final type.
        tensor: gives the values of one; asked once for each, a shard's at a time.
        limit: bytes of one shard.
    """
    plan = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=limit)
    for file, names in plan.filename_to_tensors.items():
        with torch.inference_mode():
            values = {name: tensor(name).contiguous() for name in names}
        save_file(values, folder / file, metadata={"format": "pt"})
        readable_as_usual(folder / file)
        del values
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
