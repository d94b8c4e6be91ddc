"""Sizes of the published models, so that their parameters can be counted without any download."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from mixlora_cli.models.linear_llava import LinearLlavaConfig

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


LLAVA_V1_7B = Architecture(4096, 11_008, 32, 32, 2048, 1e-6, 224, linear_projector=True)
LLAVA_1_5_7B = Architecture(4096, 11_008, 32, 32, 4096, 1e-5, 336, linear_projector=False)
LLAVA_1_5_13B = Architecture(5120, 13_824, 40, 40, 4096, 1e-5, 336, linear_projector=False)

ARCHITECTURES = {
    "llava_v1_7b": LLAVA_V1_7B,
    "llava-hf/llava-1.5-7b-hf": LLAVA_1_5_7B,
    "llava-hf/llava-1.5-13b-hf": LLAVA_1_5_13B,
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
