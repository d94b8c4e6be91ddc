"""A static update as PEFT's plain LoRA: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixlora_cli.analysis.export.fit import MeanUpdate
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.models.adapters import ADAPTER_WEIGHTS
from mixlora_cli.store import readable_as_usual


def lora_config(
    adapter: MixLoraConfig, layers: Iterable[str], rank: int, base: str | None, revision: str | None
) -> LoraConfig:
    """LoRA of this rank at scale alpha / r = 1 on the layers that the MixLoRA adapter has.

    Args:
        layers: their full names; used where the adapter leaves them to PEFT's table of architectures.
        base: what `base_model_name_or_path` says where the adapter does not know; `revision` likewise.
    """
    targets = adapter.target_modules or layers
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else sorted(targets),
        exclude_modules=adapter.exclude_modules,
        modules_to_save=adapter.modules_to_save,
        base_model_name_or_path=adapter.base_model_name_or_path or base,
        revision=adapter.revision or revision,
        inference_mode=True,
    )
    config.auto_mapping = adapter.auto_mapping
    return config


def modules_trained_whole(adapter_folder: Path) -> dict[str, Tensor]:
    """Weights in an adapter folder that are not the method's own: a projector that was trained with it."""
    weights = load_file(adapter_folder / ADAPTER_WEIGHTS)
    return {name: tensor for name, tensor in weights.items() if f".{MixLoraModel.prefix}" not in name}


def write_static_lora(
    folder: Path, config: LoraConfig, updates: Mapping[str, MeanUpdate], others: Mapping[str, Tensor]
) -> None:
    """Write the adapter.

    Args:
        updates: by layer name in the base model.
        others: `modules_trained_whole`, copied as they are.
    """
    weights = dict(others)
    for layer, update in updates.items():
        lora_a, lora_b = update.factors(config.r)
        weights[f"base_model.model.{layer}.lora_A.weight"] = lora_a
        weights[f"base_model.model.{layer}.lora_B.weight"] = lora_b
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    readable_as_usual(folder / ADAPTER_WEIGHTS)


def folder_names(tasks: Iterable[str]) -> dict[str, str]:
    """A folder name for each task: characters that file systems dislike become "_", and no two are alike."""
    names: dict[str, str] = {}
    for task in tasks:
        plain = re.sub(r"[^\w+-]+", "_", task).strip("_") or "task"
        taken = {name.lower() for name in names.values()}
        number = 2
        name = plain
        while name.lower() in taken:
            name, number = f"{plain}-{number}", number + 1
        names[task] = name
    return names
