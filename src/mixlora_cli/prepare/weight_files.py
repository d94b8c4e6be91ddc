"""Weight files that others made, read as data: no pickle is ever run, and tensors stay on disk until they are used."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from mixlora_cli.data.text_files import read_json
from mixlora_cli.errors import UserError
from mixlora_cli.store import is_lfs_pointer


class WeightFile(NamedTuple):
    """The wanted tensors of one file, or of all shards of one index."""

    name: str
    tensors: dict[str, Tensor]
    others: list[str]
    """Names of the tensors that were not wanted."""


def read_weights(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> WeightFile:
    """Read a file of safetensors, what `torch.save` wrote, or the shards that an index (`*.index.json`) lists.

    Args:
        path: the file or index.
        wanted: whether a tensor of this name is needed; shards without one are not opened.

    Raises:
        UserError: a file is missing or broken, holds no tensors by name, or would have to be run to be read.
    """
    if path.suffix == ".json":
        return _read_shards(path, wanted)
    loaded = load_data(path)
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, expected tensors by name (a state_dict)")
    tensors = {name: value for name, value in loaded.items() if wanted(name)}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
    return WeightFile(path.name, tensors, [name for name in loaded if name not in tensors])


def _read_shards(index: Path, wanted: Callable[[str], bool]) -> WeightFile:
    shard_of = read_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise UserError(f"{index}: no weight_map from names to files in it; it is no index of shards")
    tensors: dict[str, Tensor] = {}
    for shard in sorted({shard for name, shard in shard_of.items() if wanted(name)}):
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise UserError(f"{index}: names {shard}, which does not lie beside it; copy all shards there")
        tensors.update(read_weights(index.parent / shard, wanted).tensors)
    missing = [name for name in shard_of if wanted(name) and name not in tensors]
    if missing:
        raise UserError(f"{index}: {len(missing)} tensors are not in their shards, the first is {missing[0]}")
    return WeightFile(index.name, tensors, [name for name in shard_of if name not in tensors])


def read_object(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file.

    Raises:
        UserError: it has none.
    """
    content = read_json(path, "a JSON object")
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected keys with values")
    return content


def load_data(path: Path, allowed: tuple[type, ...] = ()) -> Any:
    """What a file of safetensors or one that `torch.save` wrote holds, mapped from disk.

    PyTorch's restricted reader builds tensors, containers and plain values and nothing else. A file that names any
    other class or function is refused without touching it.

    Args:
        path: the file.
        allowed: harmless classes that may occur besides.

    Raises:
        UserError: the file is broken, or asks for more.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, nothing that a user could change
            # What torch wrote before 1.6 is no zip archive and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a broken or forged file can make the reader fail in any way
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    if is_lfs_pointer(path):
        return "only a Git LFS pointer, the file itself was not downloaded; run `git lfs pull`"
    if isinstance(error, UnpicklingError):
        named = re.search(r"(?:GLOBAL|class|function) ([A-Za-z_][\w.]*\.\w+)", str(error))
        what = named.group(1) if named else "code"
        return f"refused, to read it {what} would have to run; only tensors and plain values are read"
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"broken or cut short ({path.stat().st_size} bytes): {reason[:120].rstrip('. ')}; copy or download it again"
