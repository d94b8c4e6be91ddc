"""A randomly initialised LLaVA of a few thousand parameters, and adapters so large that routing decides its output."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mixlora_cli import MixLoraConfig

IMAGE, PAD = 3, 0
NUM_IMAGE_TOKENS = 4


def build_llava(seed: int = 0) -> LlavaForConditionalGeneration:
    """Hidden size 32, two decoder layers; the wide spread makes the output react strongly to its input."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=None,
        ),
        image_token_index=IMAGE,
        image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_layer=-2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = PAD
    # Read back without cache, an image token in an answer would have no image.
    model.generation_config.suppress_tokens = [PAD, IMAGE]
    return model.eval()


def build_llama(seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    """The language model of `build_llava` alone."""
    config = build_llava().config.text_config.to_dict() | fields
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.generation_config.pad_token_id = PAD
    return model


def strengthen(model: nn.Module, seed: int = 1) -> None:
    """Give the B factors values and the routers sharp opinions, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixlora_factors_b" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "mixlora_router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def adapt(base: nn.Module, **fields: Any) -> PeftModel:
    """A strengthened adapter with E=8, r=2 unless told otherwise."""
    torch.manual_seed(2)
    model = get_peft_model(base, MixLoraConfig(**{"r": 2, "factors": 8, **fields}))
    strengthen(model)
    return model.eval()


def prompt(length: int, seed: int) -> tuple[list[int], Tensor]:
    """Ids of a prompt with one image and `length` words, and the image (1, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, 64, (length,), generator=generator).tolist()
    return [1, *[IMAGE] * NUM_IMAGE_TOKENS, *words], torch.randn(1, 3, 16, 16, generator=generator)


def batch(prompts: list[tuple[list[int], Tensor]], side: str = "left", extra: int = 0) -> dict[str, Tensor]:
    """Prompts padded on one side to the longest of them plus `extra`."""
    width = max(len(ids) for ids, _ in prompts) + extra
    rows, masks = [], []
    for ids, _ in prompts:
        padding = width - len(ids)
        left, right = (padding, 0) if side == "left" else (0, padding)
        rows.append([PAD] * left + ids + [PAD] * right)
        masks.append([0] * left + [1] * len(ids) + [0] * right)
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(masks),
        "pixel_values": torch.cat([image for _, image in prompts]),
    }
