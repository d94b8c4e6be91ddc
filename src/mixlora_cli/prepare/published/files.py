"""Read a checkpoint's files as data: no pickle of a stranger is ever run."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mixlora_cli.data.text_files import parse_json, read_text
from mixlora_cli.errors import UserError
from mixlora_cli.store import is_lfs_pointer

WHOLE_MODEL = (
    "pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "model.safetensors.index.json",
)
ADAPTER_ALONE = ("adapter_model.safetensors", "adapter_model.bin")
BESIDES = ("non_lora_trainables.bin", "mm_projector.bin")
"""Files of other versions of the code that hold what the main file may lack."""


@dataclass(frozen=True)
class TensorFile:
    """The wanted tensors of one file, or of one set of shards."""

    name: str
    tensors: dict[str, Tensor]
    others: tuple[str, ...]
    """Names of the tensors that were not wanted, such as the frozen base's."""


def read_tensor_files(folder: Path, wanted: Callable[[str], bool]) -> list[TensorFile]:
    """Read the main file of a checkpoint and those beside it, the most authoritative first.

    Args:
        wanted: whether a tensor of this name is needed; the others stay on disk.

    Raises:
        UserError: there is no such file, or one is broken, holds no tensors or would have to be run to be read.
    """
    main = next((name for name in (*WHOLE_MODEL, *ADAPTER_ALONE) if (folder / name).is_file()), None)
    if main is None:
        raise UserError(_nothing_here(folder))
    names = [main, *(name for name in BESIDES if (folder / name).is_file())]
    return [
        _read_shards(folder / name, wanted) if name.endswith(".json") else _read_file(folder / name, wanted)
        for name in names
    ]


def _nothing_here(folder: Path) -> str:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    if checkpoints:
        hint = f"give one of the checkpoints in it, such as {checkpoints[-1]}"
    elif (folder / "zero_to_fp32.py").is_file() or any(folder.glob("global_step*")):
        hint = "its weights are still sharded by DeepSpeed: run the zero_to_fp32.py that DeepSpeed put there first"
    else:
        hint = "give the output folder of the published training code"
    return f"{folder}: no checkpoint here, expected {', '.join((*WHOLE_MODEL, *ADAPTER_ALONE))}; {hint}"


def _read_shards(index: Path, wanted: Callable[[str], bool]) -> TensorFile:
    """The shards that an index lists; those without a wanted tensor are not opened."""
    shard_of = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted({file for name, file in shard_of.items() if wanted(name)}):
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise UserError(f"{index}: names {shard}, which does not lie beside it; copy all shards there")
        tensors.update(_read_file(index.parent / shard, wanted).tensors)
    missing = [name for name in shard_of if wanted(name) and name not in tensors]
    if missing:
        raise UserError(f"{index}: {len(missing)} tensors are not in their shards, the first is {missing[0]}")
    return TensorFile(index.name, tensors, tuple(name for name in shard_of if name not in tensors))


def _weight_map(index: Path) -> dict[str, str]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(file, str) for file in shard_of.values()):
        raise UserError(f"{index}: no weight_map from names to files in it; it is no index of shards")
    return shard_of


def _read_file(path: Path, wanted: Callable[[str], bool]) -> TensorFile:
    if path.suffix == ".safetensors":
        return _read_safetensors(path, wanted)
    loaded = read_pickle(path)
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        raise UserError(f"{path}: holds {_kind(loaded)}, expected tensors by name (a state_dict)")
    tensors = {name: value for name, value in loaded.items() if wanted(name)}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name} is {_kind(value)}, expected a tensor")
    return TensorFile(path.name, tensors, tuple(name for name in loaded if name not in tensors))


def _kind(value: object) -> str:
    """What something is, in words: "a str", "an int", "nothing"."""
    name = type(value).__name__
    return "nothing" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _read_safetensors(path: Path, wanted: Callable[[str], bool]) -> TensorFile:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names if wanted(name)}
    except Exception as error:
        raise UserError(_broken(path, error)) from error
    return TensorFile(path.name, tensors, tuple(name for name in names if name not in tensors))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        UserError: it is none.
    """
    try:
        content = parse_json(read_text(path, "a JSON file"), str(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {_kind(content)}, expected keys with values")
    return content


def read_pickle(path: Path, allowed: tuple[type, ...] = ()) -> Any:
    """What `torch.save` wrote: tensors, containers and plain values; tensors stay on disk until they are used.

    PyTorch's restricted reader builds these and nothing else. A file that names any other class or function is refused
    without touching it.

    Args:
        allowed: harmless classes that may occur besides.

    Raises:
        UserError: the file is broken, or asks for more.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, nothing that a user could change
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        if is_lfs_pointer(path):
            raise UserError(_broken(path, error)) from error
        raise UserError(
            f"{path}: refused, {_what_it_asks_for(error)}; only tensors and plain values are read"
        ) from error
    except Exception as error:
        # A broken or forged file can make the reader fail in any way.
        raise UserError(_broken(path, error)) from error


def _what_it_asks_for(error: UnpicklingError) -> str:
    named = re.search(r"(?:GLOBAL|class|function) ([A-Za-z_][\w.]*\.\w+)", str(error))
    return f"to read it {named.group(1)} would have to run" if named else "to read it code would have to run"


def _broken(path: Path, error: Exception) -> str:
    if is_lfs_pointer(path):
        return f"{path}: only a Git LFS pointer, the file itself was not downloaded; run `git lfs pull`"
    size = path.stat().st_size
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{path}: broken or cut short ({size} bytes): {reason[:120].rstrip('. ')}; copy or download it again"
    )
