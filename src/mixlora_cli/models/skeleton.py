"""A model's architecture on the meta device: every parameter has a shape and none has memory. For counting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from mixlora_cli.config import AdapterConfig, ModelConfig, RoutingConfig
from mixlora_cli.errors import UserError
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.load import checkpoint_source
from mixlora_cli.models.mini import mini_config
from mixlora_cli.models.networks import LinearLlava, LinearLlavaConfig, register_models
from mixlora_cli.models.tiny import build_tiny

VOCABULARY = 32_064
"""LLaMA's 32,000 tokens, `<image>`, and rows up to the next multiple of 64."""
IMAGE_TOKEN_ID = 32_000
PATCH_SIZE = 14


@dataclass(frozen=True)
class Architecture:
    """LLaMA, CLIP ViT-L/14 and a projector."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    rms_norm_eps: float
    image_size: int
    """Side of the picture in pixels; 224 -> 256 patches, 336 -> 576."""
    linear_projector: bool
    """One linear layer (LLaVA-v1), or two with GELU between them (LLaVA-1.5)."""


ARCHITECTURES = {
    "llava_v1_7b": Architecture(4096, 11_008, 32, 32, 2048, 1e-6, 224, linear_projector=True),
    "llava-hf/llava-1.5-7b-hf": Architecture(4096, 11_008, 32, 32, 4096, 1e-5, 336, linear_projector=False),
    "llava-hf/llava-1.5-13b-hf": Architecture(5120, 13_824, 40, 40, 4096, 1e-5, 336, linear_projector=False),
}
"""By the name of a model that is prepared, or by hub id."""


def llava_config(architecture: Architecture) -> LlavaConfig:
    """The transformers configuration of a published model."""
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_heads,
        max_position_embeddings=architecture.max_positions,
        rms_norm_eps=architecture.rms_norm_eps,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=architecture.image_size,
        patch_size=PATCH_SIZE,
        projection_dim=768,
    )
    config_class = LinearLlavaConfig if architecture.linear_projector else LlavaConfig
    return config_class(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=(architecture.image_size // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


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
    train_also: Sequence[str] = (),
) -> PreTrainedModel | PeftModel:
    """`attach_adapter` without memory for what it adds."""
    with torch.device("meta"):
        return attach_adapter(skeleton, adapter, routing, rank, factors, train_also)


def _config(model: ModelConfig) -> LlavaConfig:
    if model.source == "tiny":
        config: Any = build_tiny(model.chat_template or "v1").model.config
        assert isinstance(config, LlavaConfig)
        return config
    if model.source == "mini":
        return mini_config(
            LlamaConfig(
                vocab_size=49_152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                max_position_embeddings=8192,
            )
        )
    source = checkpoint_source(model)
    key = model.name if model.source == "prepared" else source
    if not (Path(source) / "config.json").is_file() and key in ARCHITECTURES:
        return llava_config(ARCHITECTURES[key])
    register_models()
    try:
        read: PreTrainedConfig = AutoConfig.from_pretrained(source, revision=model.revision or "main")
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name_or_path={source}: its config.json cannot be read; known without it: {', '.join(ARCHITECTURES)}"
        ) from error
    if not isinstance(read, LlavaConfig):
        raise UserError(
            f"model.name_or_path={source} is a {read.model_type} model; expected model_type llava"
        )
    return read
