"""Weights of a part, mapped from their files: shapes cost nothing, values are read when they are used."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mixlora_cli.prepare.parts import PICKLED, SAFETENSORS, Part


def read_weights(part: Part) -> dict[str, Tensor]:
    """Every tensor of the part's weight files by name; safetensors where there are any, else pickled ones.

    Raises:
        UserError: no weights, a missing or damaged file, or a file that wants to run code.
    """
    weights: dict[str, Tensor] = {}
    for file in _files(part):
        for name, tensor in read_file(part, file).items():
            if name in weights:
                raise part.refuse(f"{name} is in two weight files, the second is {file.name}")
            weights[name] = tensor
    return weights


def read_file(part: Part, file: Path) -> dict[str, Tensor]:
    """The tensors of one file; never runs code that is in it.

    Raises:
        UserError: the file cannot be read, or holds something other than tensors by name.
    """
    try:
        values = load_file(file) if file.suffix == ".safetensors" else _unpickle(file)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise part.refuse(
            f"{file.name} cannot be read ({_short(error)}): it is damaged, incomplete, or no file of weights; "
            "fetch it again"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise part.refuse(f"{file.name} does not hold tensors by name")
    return values


def _unpickle(file: Path) -> object:
    # What torch wrote before 1.6 is no zip archive and cannot be mapped.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _files(part: Part) -> list[Path]:
    if not part.path.is_dir():
        raise part.refuse("must be a folder with a model in Hugging Face's layout; this is a file")
    for pattern in (SAFETENSORS, PICKLED):
        indices = sorted(part.path.glob(f"{pattern}.index.json"))
        if indices:
            return _indexed(part, indices[0])
        files = sorted(part.path.glob(pattern))
        if files:
            return files
    raise part.refuse(f"{part.path} has no weights: expected {SAFETENSORS} or {PICKLED}")


def _indexed(part: Part, index: Path) -> list[Path]:
    """The files that an index names, all of which must be beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise part.refuse(f"{index.name} cannot be read; fetch it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise part.refuse(f"{index.name} names {name!r}, which is not a file beside it")
        if not (part.path / name).is_file():
            raise part.refuse(
                f"{name} is missing, one of {len(names)} files that {index.name} names; fetch it"
            )
    return [part.path / name for name in names]


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__
