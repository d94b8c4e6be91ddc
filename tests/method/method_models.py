"""Randomly initialised models of a few thousand parameters, and adapters so large that routing decides their output."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
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
from mixlora_cli.method.layer import MixLoraLinear
from mixlora_cli.method.selection import Selection

IMAGE, PAD = 3, 0
NUM_IMAGE_TOKENS = 4
NEW = 6
"""Tokens that `generate` adds."""

SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    **SPECIAL,
}
WIDE = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
HALVES = ("encoder", "decoder")
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: class of the model, of its configuration, sizes
    "llama": ("LlamaForCausalLM", "LlamaConfig", WIDE),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", WIDE),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        WIDE | {"head_dim": 8, "sliding_window": 4, "tie_word_embeddings": False},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", WIDE),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | {"intermediate_size": 48}),
    "bloom": ("BloomForCausalLM", "BloomConfig", SIZES | {"n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", WIDE | {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        WIDE | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", SIZES | {"state_size": 4}),
    "bamba": (
        "BambaForCausalLM",
        "BambaConfig",
        WIDE | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"initializer_factor": 2.0, "dropout_rate": 0.0, "decoder_start_token_id": 1, **SPECIAL},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": 64, "d_model": 32, "init_std": 0.3, "max_position_embeddings": 64}
        | {f"{half}_layers": 2 for half in HALVES}
        | {f"{half}_attention_heads": 4 for half in HALVES}
        | {f"{half}_ffn_dim": 48 for half in HALVES}
        | {"decoder_start_token_id": 1, "forced_eos_token_id": None, **SPECIAL},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        WIDE
        | {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "moe_intermediate_size": 16}
        | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"vocab_size": 64, "context_length": 64, "hidden_size": 32, "attention_hidden_size": 32}
        | {"num_hidden_layers": 2, **SPECIAL},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"vocab_size": 64, "d_model": 32, "init_std": 0.3, "num_mel_bins": 8}
        | {f"{half}_layers": 2 for half in HALVES}
        | {f"{half}_attention_heads": 4 for half in HALVES}
        | {f"{half}_ffn_dim": 48 for half in HALVES}
        | {"max_source_positions": 10, "max_target_positions": 32, "decoder_start_token_id": 1}
        | {"suppress_tokens": None, "begin_suppress_tokens": None, **SPECIAL},
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48}
        | {"num_hidden_layers": 1, "num_attention_heads": 2}
        | {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2)}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_size": 32, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
        | {"num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "bert_choice": (
        "BertForMultipleChoice",
        "BertConfig",
        SIZES | {"intermediate_size": 48},
    ),
    "llama_classifier": ("LlamaForSequenceClassification", "LlamaConfig", WIDE | {"num_labels": 3}),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": WIDE | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
            | {"out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2, "window_size": 16}
            | {"fullatt_block_indexes": [1]},
            "image_token_id": IMAGE,
            "vision_start_token_id": 2,
            "video_token_id": 60,
        },
    ),
}


def build(name: str, attention: str | None = None) -> Any:
    """A tiny model of `TINY`, with transformers' choice of an attention kernel unless one is named."""
    model_class, config_class, sizes = TINY[name]
    config = getattr(hf, config_class)(**sizes)
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(hf, model_class)(config).eval()
    if model.can_generate():
        model.generation_config.pad_token_id = PAD
    return model


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


LEARNS: dict[str, Any] = {"router_grad": "straight_through"}
MECHANISMS: dict[str, dict[str, Any]] = {
    "normalize": {"normalize": True},
    "text": {"pool": "text"},
    "tied": {"pairing": "tied", **LEARNS},
    "block": {"per": "block", "pairing": "tied", **LEARNS},
    "block_hard": {"per": "block", "normalize": True, "pool": "prompt", **LEARNS},
    "plus": {
        "normalize": True,
        "router_init": "clusters",
        "pool": "text",
        "pairing": "tied",
        **LEARNS,
    },
}
"""Ways beyond the paper to select, and combinations of them."""


def strengthen(model: nn.Module, seed: int = 1, name: str = "") -> None:
    """Give the B factors values and the routers sharp opinions, as after training; of one adapter if named."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name and f".{name}." not in key:
                continue
            if "mixlora_factors_b" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "mixlora_router" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def adapt(base: nn.Module, **fields: Any) -> PeftModel:
    """A strengthened adapter with E=8, r=2 unless told otherwise."""
    torch.manual_seed(2)
    model = get_peft_model(base, MixLoraConfig(**{"r": 2, "factors": 8, **fields}))
    strengthen(model)
    calibrate(model)
    return model.eval()


def calibrate(model: nn.Module) -> None:
    """Give the adapter statistics, where it has any, of descriptions that lie apart from zero."""
    generator = torch.Generator().manual_seed(5)
    for layer in model.modules():
        for name, standardiser in getattr(layer, "mixlora_standardiser", {}).items():
            width = len(standardiser.mean)
            layer.calibrate(name, torch.randn(64, width, generator=generator) * 0.5 + 0.1)
            for routers in (layer.mixlora_router_a, layer.mixlora_router_b):
                if name in routers and routers[name].bias is not None:
                    # Noise tells nothing of the models' inputs, so these would select nearly the same for all.
                    weight = routers[name].weight.data
                    weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
                    routers[name].bias.data.zero_()


def prompt(length: int, seed: int) -> tuple[list[int], Tensor]:
    """Ids of a prompt with one image and `length` words, and the image (1, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, 64, (length,), generator=generator).tolist()
    return [1, *[IMAGE] * NUM_IMAGE_TOKENS, *words], torch.randn(1, 3, 16, 16, generator=generator)


def texts() -> list[list[int]]:
    """Three texts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 64, (length,), generator=generator).tolist() for length in (5, 9, 7)]


def padded(rows: list[list[int]], side: str, extra: int = 0) -> dict[str, Tensor]:
    """Texts padded on one side to the longest of them plus `extra`."""
    width = max(map(len, rows)) + extra
    ids, masks = [], []
    for row in rows:
        padding = width - len(row)
        left, right = (padding, 0) if side == "left" else (0, padding)
        ids.append([PAD] * left + row + [PAD] * right)
        masks.append([0] * left + [1] * len(row) + [0] * right)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def batch(prompts: list[tuple[list[int], Tensor]], side: str = "left", extra: int = 0) -> dict[str, Tensor]:
    """Prompts with their images, padded as `padded` does."""
    images = torch.cat([image for _, image in prompts])
    return padded([ids for ids, _ in prompts], side, extra) | {"pixel_values": images}


def beside(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, tensors among them on the model's device."""
    place = next(model.parameters()).device
    return {name: value.to(place) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """New tokens (rows, NEW) of greedy decoding."""
    tokens: Tensor = model.generate(**beside(model, inputs | options), max_new_tokens=NEW, do_sample=False)
    return tokens[:, -NEW:]


def logits(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Logits (rows, tokens, vocabulary) without gradients."""
    with torch.no_grad():
        found: Tensor = model(**beside(model, inputs | options)).logits
    return found


def adapted_layers(model: PeftModel) -> set[str]:
    """Names of the layers that the adapter took."""
    return {name for name, m in model.get_base_model().named_modules() if isinstance(m, MixLoraLinear)}


def assert_same_choice(together: dict[str, Selection], row: int, alone: dict[str, Selection]) -> None:
    """Both pools' factors of an instance are the same in a batch and by itself, in every layer."""
    assert together.keys() == alone.keys()
    for name, selection in alone.items():
        assert torch.equal(selection.index_a[0], together[name].index_a[row]), name
        assert torch.equal(selection.index_b[0], together[name].index_b[row]), name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients there are, which are reset."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    """The same tensors by name."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
