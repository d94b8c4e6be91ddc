"""From a `ModelConfig` to a `Base`."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from transformers.utils.logging import disable_progress_bar

from mixlora_cli.config import ModelConfig
from mixlora_cli.models.base import Base
from mixlora_cli.models.prepared import prepared_folder, require_prepared


def build_base(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Base:
    """Load the base model with frozen weights of `dtype`, in eval mode.

    Raises:
        UserError: weights or packages are missing, a model is not prepared, or the checkpoint is not of LLaVA class.
    """
    _quiet_libraries()
    if model.source == "mini":
        from mixlora_cli.models.mini_base import mini_base

        return mini_base(dtype)
    if model.source == "tiny":
        from mixlora_cli.models.tiny import build_tiny

        return build_tiny(model.template, dtype)
    from mixlora_cli.models.hub import hub_base

    if model.source == "prepared":
        require_prepared(model)
        model = replace(model, source="hub", name_or_path=str(prepared_folder(model)))
    return hub_base(model, dtype)


def _quiet_libraries() -> None:
    """Bars of loading parts say nothing to a person, and PEFT's use of an old name is not the user's to mend."""
    disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
