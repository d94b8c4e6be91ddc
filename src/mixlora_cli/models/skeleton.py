"""A model's architecture on the meta device: every parameter has a shape and none has memory. For counting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from mixlora_cli.config import AdapterConfig, ModelConfig, RoutingConfig
from mixlora_cli.errors import UserError
from mixlora_cli.models import linear_llava, tower
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.architectures import ARCHITECTURES, llava_config
from mixlora_cli.models.linear_llava import LinearLlava, LinearLlavaConfig
from mixlora_cli.models.mini_base import IMAGE_SIZE
from mixlora_cli.models.prepared import prepared_folder
from mixlora_cli.models.tiny import build_tiny


def build_skeleton(model: ModelConfig) -> PreTrainedModel:
    """The model that `build_base` would load, on the meta device, frozen, in eval mode.

    Offline for the published models of `conf/model`, for local folders, `mini` and `tiny`; another hub id is asked
    for its configuration.

    Raises:
        UserError: the architecture is not known here and cannot be read.
    """
    config = _config(model)
    config._attn_implementation = "eager"  # has no say in any shape, and always exists
    with torch.device("meta"):
        if isinstance(config, LinearLlavaConfig):
            skeleton: PreTrainedModel = LinearLlava(config)
        else:
            skeleton = LlavaForConditionalGeneration(config)
    skeleton.tie_weights()
    skeleton.requires_grad_(False).eval()
    return skeleton


def attach_to_skeleton(
    skeleton: PreTrainedModel,
    adapter: AdapterConfig,
    routing: RoutingConfig,
    rank: int,
    factors: int,
    train_projector: bool = False,
) -> PreTrainedModel | PeftModel:
    """`attach_adapter` without memory for what it adds."""
    with torch.device("meta"):
        return attach_adapter(skeleton, adapter, routing, rank, factors, train_projector)


def _config(model: ModelConfig) -> LlavaConfig:
    if model.source == "tiny":
        config: Any = build_tiny(model.template).model.config
        assert isinstance(config, LlavaConfig)
        return config
    if model.source == "mini":
        return _mini_config()
    source = str(prepared_folder(model)) if model.source == "prepared" else str(model.name_or_path)
    key = model.name if model.source == "prepared" else source
    if not (Path(source) / "config.json").is_file() and key in ARCHITECTURES:
        return llava_config(ARCHITECTURES[key])
    return _read_config(source, model.revision)


def _read_config(source: str, revision: str | None) -> LlavaConfig:
    tower.register()
    linear_llava.register()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name_or_path={source}: its config.json cannot be read; known without it: {', '.join(ARCHITECTURES)}"
        ) from error
    if not isinstance(config, LlavaConfig):
        raise UserError(
            f"model.name_or_path={source} is a {config.model_type} model; expected model_type llava"
        )
    return config


def _mini_config() -> LlavaConfig:
    """SmolLM2-135M and the small tower, as `models/mini.py` puts them together."""
    tower.register()
    text = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        text_config=text,
        vision_config=tower.EfficientNetLiteConfig(image_size=IMAGE_SIZE),
        image_seq_length=(IMAGE_SIZE // tower.STRIDE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
