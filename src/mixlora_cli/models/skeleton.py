"""A model's architecture on the meta device: every parameter has a shape and none has memory. For counting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import (
    AutoConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from mixlora_cli.config import AdapterConfig, ModelConfig, RoutingConfig
from mixlora_cli.errors import UserError
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.load import auto_class, checkpoint_source, first_line, read_config
from mixlora_cli.models.mini import mini_config
from mixlora_cli.models.networks import register_models
from mixlora_cli.models.tiny import build_tiny

_PICTURES = "image_processor"


@cache
def _published() -> dict[str, dict[str, Any]]:
    """What published.yaml says, by hub id or by the name of a model that is prepared."""
    file = Path(__file__).with_name("published.yaml")
    read: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return read


def published_config(name: str) -> PreTrainedConfig:
    """The configuration of a published model, as far as shapes depend on it.

    Raises:
        KeyError: it is not known here.
    """
    register_models()
    settings = {key: value for key, value in _published()[name].items() if key != _PICTURES}
    return AutoConfig.for_model(**settings)


def is_published(model: ModelConfig) -> bool:
    """Whether a model's sizes are taken from published.yaml, not from a folder or the hub."""
    return (
        model.source in ("hub", "prepared")
        and _key(model) in _published()
        and not (Path(checkpoint_source(model)) / "config.json").is_file()
    )


def published_pictures(model: ModelConfig) -> dict[str, Any] | None:
    """Settings of a published model's image processor, where the size of a picture decides on its tokens."""
    return _published()[_key(model)].get(_PICTURES)


def build_skeleton(model: ModelConfig) -> PreTrainedModel:
    """The model that `build_base` would load, on the meta device, frozen, in eval mode.

    Offline for the published models of `conf/model`, for local folders, `mini` and `tiny`; another hub id is asked
    for its configuration.

    Raises:
        UserError: the architecture is not known here and cannot be read or built, or it writes no text.
    """
    config = _config(model)
    config._attn_implementation = "eager"  # has no say in any shape, and always exists
    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = auto_class(config, _key(model)).from_config(config)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"model={model.name} ({config.model_type}) cannot be built: {first_line(error)}"
        ) from error
    skeleton.tie_weights()
    skeleton.requires_grad_(False).eval()
    return skeleton


def attach_to_skeleton(
    skeleton: PreTrainedModel,
    adapter: AdapterConfig,
    routing: RoutingConfig,
    rank: int,
    factors: int,
    train_also: Sequence[str] = (),
) -> PreTrainedModel | PeftModel:
    """`attach_adapter` without memory for what it adds."""
    with torch.device("meta"):
        adapted = attach_adapter(skeleton, adapter, routing, rank, factors, train_also)
    tuner = getattr(adapted, "base_model", None)
    if isinstance(tuner, MixLoraModel):
        tuner.skip_calibration()
    return adapted


def _config(model: ModelConfig) -> PreTrainedConfig:
    """The configuration of the model that `build_base` would load. See `build_skeleton`."""
    if model.source == "tiny":
        return build_tiny(model.chat_template or "v1").model.config
    if model.source in ("mini", "smollm"):
        language = published_config("HuggingFaceTB/SmolLM2-135M-Instruct")
        assert isinstance(language, LlamaConfig)
        return mini_config(language) if model.source == "mini" else language
    if is_published(model):
        return published_config(_key(model))
    source = checkpoint_source(model)
    try:
        return read_config(source, model.revision or "main")
    except UserError as error:
        raise UserError(
            f"model.name_or_path={source}: its config.json cannot be read; known without it: "
            f"{', '.join(_published())}"
        ) from error


def _key(model: ModelConfig) -> str:
    return checkpoint_source(model) if model.source == "hub" else model.name
