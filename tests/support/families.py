"""Folders of tiny models: today's families, each with its real class, its real processor and the form of its chats.

Nothing is downloaded: tokenizers are trained on a few lines, weights are random (spread wide, so that inputs matter)
and the same on every call. A folder has the files that the family's folders on the hub have, under the same names.
The templates in chat_templates/ write what the families' models read, in our own words; what is odd about a family
stays odd: pictures that move to the front, answers without an end, blocks of thought.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from family_tokenizers import gemma, internvl, llama, llama3, onevision, qwen, smollm, utterances

TEMPLATES = Path(__file__).parent / "chat_templates"
WEIGHT_SEED = 20261127
SPREAD = 0.2

Tokenizer = PreTrainedTokenizerBase
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": SPREAD,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": SPREAD,
    "image_size": 16,
}


@dataclass(frozen=True)
class Family:
    """How a folder is made, and what a test must know of it."""

    tokenizer: Callable[[], Tokenizer]
    network: Callable[[Tokenizer], PreTrainedModel]
    template: str
    """Name of a file in chat_templates/."""
    ends: tuple[str, ...]
    """Tokens that end an answer, as the generation configuration names them."""
    pictures: Callable[[], Any] | None = None
    """Makes the image processor; None for a family that reads text alone."""
    processor: dict[str, Any] = field(default_factory=dict)
    """What processor_config.json holds."""
    films: str | None = None
    """Class of the part that reads films, for families that have one; it needs torchvision."""


def make_family(name: str, folder: Path) -> Path:
    """Write the whole checkpoint of one of `FAMILIES` into a new folder and return it."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(WEIGHT_SEED)
        network = family.network(tokenizer)
        for weight in network.parameters():
            if (
                weight.dim() > 1 and not weight.any()
            ):  # Gemma 3's projector begins with zeros: no picture would matter
                torch.nn.init.normal_(weight, std=SPREAD)
    network.generation_config = hf.GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(list(family.ends)),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    network.save_pretrained(folder)
    tokenizer.chat_template = (TEMPLATES / f"{family.template}.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    if family.pictures is not None:
        family.pictures().save_pretrained(folder)
        _write(folder / "processor_config.json", family.processor)
    if family.films is not None:
        settings = {"video_processor_type": family.films, "fps": 1, "num_frames": 4}
        _write(folder / "video_preprocessor_config.json", settings)
    return folder


def make_wrong(name: str, folder: Path) -> Path:
    """Write one of `WRONG` into a new folder and return it: a model that writes no answers."""
    WRONG[name](folder)
    return folder


def _write(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _ids(tokenizer: Tokenizer, **tokens: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _text(tokenizer: Tokenizer, **others: Any) -> dict[str, Any]:
    """A text configuration; a few rows of the vocabulary stay unused, as in real checkpoints."""
    own = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return _TEXT | own | {"vocab_size": len(tokenizer) + 5} | others


def _gemma_text(tokenizer: Tokenizer) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]
    return _text(tokenizer, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, layer_types=kinds)


def _causal(
    model: type[PreTrainedModel],
    tokenizer: Tokenizer,
    text: Callable[..., dict[str, Any]] = _text,
    **others: Any,
) -> PreTrainedModel:
    """A language model."""
    return model(model.config_class(**text(tokenizer) | others))


def _qwen_vl(
    model: type[PreTrainedModel], vision: dict[str, Any], tokenizer: Tokenizer, **text: Any
) -> PreTrainedModel:
    """Qwen's: positions in three dimensions, pictures of any size."""
    ids = _ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    shared = {"depth": 2, "num_heads": 2, "patch_size": 4, "initializer_range": SPREAD}
    written = _text(tokenizer, rope_parameters=rope, **text)
    return model(model.config_class(text_config=written, vision_config=shared | vision, **ids))


def _in_tiles(model: type[PreTrainedModel], tokenizer: Tokenizer) -> PreTrainedModel:
    """SmolVLM and Idefics 3."""
    return model(
        model.config_class(
            text_config=_text(tokenizer) | {"model_type": "llama"},
            vision_config=_VISION | {"patch_size": 4},
            scale_factor=2,
            pad_token_id=tokenizer.pad_token_id,
            **_ids(tokenizer, image_token_id="<image>"),
        )
    )


def _internvl(tokenizer: Tokenizer) -> PreTrainedModel:
    config = hf.InternVLConfig(
        text_config=_text(tokenizer) | {"model_type": "qwen2"},
        vision_config=_VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
        image_seq_length=4,
        tie_word_embeddings=False,
        **_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    return hf.InternVLForConditionalGeneration(config)


def _gemma3(tokenizer: Tokenizer) -> PreTrainedModel:
    ids = _ids(
        tokenizer,
        boi_token_index="<start_of_image>",
        eoi_token_index="<end_of_image>",
        image_token_index="<image_soft_token>",
    )
    vision = _VISION | {"patch_size": 4, "vision_use_head": False}
    config = hf.Gemma3Config(
        text_config=_gemma_text(tokenizer),
        vision_config=vision,
        mm_tokens_per_image=4,
        initializer_range=SPREAD,
        **ids,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _llava(
    model: type[PreTrainedModel],
    text: str,
    vision: dict[str, Any],
    tokenizer: Tokenizer,
    image: str = "<image>",
    **others: Any,
) -> PreTrainedModel:
    """LLaVA's make: a tower, a projector, a language model."""
    return model(
        model.config_class(
            text_config=_text(tokenizer) | {"model_type": text},
            vision_config=_VISION | {"patch_size": 8} | vision,
            tie_word_embeddings=False,
            **_ids(tokenizer, image_token_index=image),
            **others,
        )
    )


_PINPOINTS = [[16, 32], [32, 16], [32, 32]]
_SIDE = {"height": 16, "width": 16}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 16}
_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
_PIXTRAL = {"model_type": "pixtral", "image_size": 24, "patch_size": 4}
_CLIP_TOKENS = {
    "patch_size": 8,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
_QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")
_qwen_pictures = partial(
    hf.Qwen2VLImageProcessorPil,
    patch_size=4,
    temporal_patch_size=2,
    merge_size=2,
    size={"shortest_edge": 64, "longest_edge": 1024},
)
_tiles = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
_pixtral_tokenizer = partial(
    llama, "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>", pad_token="<pad>"
)
_pixtral_pictures = partial(
    hf.PixtralImageProcessorPil, size={"longest_edge": 24}, patch_size={"height": 4, "width": 4}
)
_phi_tokenizer = partial(
    llama,
    *("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"),
    eos_token="<|endoftext|>",
    pad_token="<|endoftext|>",
)
_llava_tokenizer = partial(llama, "<image>", "<pad>", pad_token="<pad>")

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        qwen,
        partial(
            _qwen_vl,
            hf.Qwen2VLForConditionalGeneration,
            {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        ),
        "qwen2_vl",
        _QWEN_ENDS,
        _qwen_pictures,
        {"processor_class": "Qwen2VLProcessor"},
        "Qwen2VLVideoProcessor",
    ),
    "qwen2_5_vl": Family(
        qwen,
        partial(
            _qwen_vl,
            hf.Qwen2_5_VLForConditionalGeneration,
            {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
            | {"window_size": 16, "fullatt_block_indexes": [1]},
        ),
        "qwen2_vl",
        _QWEN_ENDS,
        _qwen_pictures,
        {"processor_class": "Qwen2_5_VLProcessor"},
        "Qwen2VLVideoProcessor",
    ),
    "qwen3_vl": Family(
        qwen,
        partial(
            _qwen_vl,
            hf.Qwen3VLForConditionalGeneration,
            {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
            | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
            head_dim=8,
        ),
        "qwen3_vl",
        _QWEN_ENDS,
        _qwen_pictures,
        {"processor_class": "Qwen3VLProcessor"},
        "Qwen3VLVideoProcessor",
    ),
    "smolvlm": Family(
        partial(utterances, "<|im_start|>", "<|im_end|>"),
        partial(_in_tiles, hf.SmolVLMForConditionalGeneration),
        "utterances",
        ("<end_of_utterance>",),
        partial(hf.SmolVLMImageProcessorPil, **_tiles),
        {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        "SmolVLMVideoProcessor",
    ),
    "idefics3": Family(
        partial(utterances, "<|begin_of_text|>", "<|end_of_text|>"),
        partial(_in_tiles, hf.Idefics3ForConditionalGeneration),
        "utterances",
        ("<end_of_utterance>",),
        partial(hf.Idefics3ImageProcessorPil, **_tiles),
        {"processor_class": "Idefics3Processor", "image_seq_len": 4},
    ),
    "internvl": Family(
        internvl,
        _internvl,
        "internvl",
        ("<|im_end|>",),
        partial(hf.GotOcr2ImageProcessorPil, size=_SIDE, crop_to_patches=True, min_patches=1, max_patches=4),
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        "InternVLVideoProcessor",
    ),
    "gemma3": Family(
        gemma,
        _gemma3,
        "gemma3",
        ("<eos>", "<end_of_turn>"),
        partial(hf.Gemma3ImageProcessorPil, size=_SIDE),
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    ),
    "llava": Family(
        _llava_tokenizer,
        partial(_llava, hf.LlavaForConditionalGeneration, "llama", _CLIP, image_seq_length=4),
        "llava",
        ("</s>",),
        partial(hf.CLIPImageProcessorPil, size={"shortest_edge": 16}, crop_size=_SIDE),
        {"processor_class": "LlavaProcessor"} | _CLIP_TOKENS,
    ),
    "llava_next": Family(
        _llava_tokenizer,
        partial(
            _llava,
            hf.LlavaNextForConditionalGeneration,
            "mistral",
            _CLIP,
            image_grid_pinpoints=_PINPOINTS,
        ),
        "llava_next",
        ("</s>",),
        partial(
            hf.LlavaNextImageProcessorPil,
            size={"shortest_edge": 16},
            crop_size=_SIDE,
            image_grid_pinpoints=_PINPOINTS,
        ),
        {"processor_class": "LlavaNextProcessor"} | _CLIP_TOKENS,
    ),
    "llava_onevision": Family(
        onevision,
        partial(
            _llava,
            hf.LlavaOnevisionForConditionalGeneration,
            "qwen2",
            _SIGLIP,
            image_grid_pinpoints=_PINPOINTS,
        ),
        "llava_onevision",
        ("<|im_end|>",),
        partial(hf.LlavaOnevisionImageProcessorPil, size=_SIDE, image_grid_pinpoints=_PINPOINTS),
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
        },
        "LlavaOnevisionVideoProcessor",
    ),
    "mistral3": Family(
        _pixtral_tokenizer,
        partial(
            _llava,
            hf.Mistral3ForConditionalGeneration,
            "mistral",
            _PIXTRAL,
            image="[IMG]",
            spatial_merge_size=2,
        ),
        "pixtral",
        ("</s>",),
        _pixtral_pictures,
        {"processor_class": "PixtralProcessor", "patch_size": 4, "spatial_merge_size": 2},
    ),
    "pixtral": Family(
        _pixtral_tokenizer,
        partial(
            _llava,
            hf.LlavaForConditionalGeneration,
            "mistral",
            _PIXTRAL,
            image="[IMG]",
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        "pixtral",
        ("</s>",),
        _pixtral_pictures,
        {"processor_class": "PixtralProcessor", "patch_size": 4},
    ),
    "smollm2": Family(smollm, partial(_causal, hf.LlamaForCausalLM), "qwen2", ("<|im_end|>",)),
    "llama3": Family(
        llama3, partial(_causal, hf.LlamaForCausalLM), "llama3", ("<|eot_id|>", "<|end_of_text|>")
    ),
    "qwen2": Family(qwen, partial(_causal, hf.Qwen2ForCausalLM), "qwen2", _QWEN_ENDS),
    "qwen3": Family(qwen, partial(_causal, hf.Qwen3ForCausalLM, head_dim=8), "qwen3", _QWEN_ENDS),
    "qwen3_moe": Family(
        qwen,
        partial(
            _causal,
            hf.Qwen3MoeForCausalLM,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        "qwen3",
        _QWEN_ENDS,
    ),
    "gemma3_text": Family(
        gemma, partial(_causal, hf.Gemma3ForCausalLM, text=_gemma_text), "gemma3", ("<eos>", "<end_of_turn>")
    ),
    "mistral": Family(
        partial(llama, "[INST]", "[/INST]"), partial(_causal, hf.MistralForCausalLM), "mistral", ("</s>",)
    ),
    "phi3": Family(
        _phi_tokenizer,
        partial(_causal, hf.Phi3ForCausalLM),
        "phi3",
        ("<|endoftext|>", "<|end|>", "<|assistant|>"),
    ),
}


def _diffusion(folder: Path) -> None:
    """A pipeline of diffusers has no config.json at its top."""
    parts = {"unet": ["diffusers", "UNet2DConditionModel"]}
    _write(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"} | parts)
    _write(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", "sample_size": 8})


_SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def _encoder(folder: Path) -> None:
    hf.BertModel(hf.BertConfig(**_SMALL)).save_pretrained(folder)


def _classifier(folder: Path) -> None:
    hf.LlamaForSequenceClassification(hf.LlamaConfig(**_SMALL)).save_pretrained(folder)


def _sound(folder: Path) -> None:
    sizes = {f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_source_positions": 8}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    config = hf.WhisperConfig(vocab_size=64, num_mel_bins=8, **sizes, **ids)
    hf.WhisperForConditionalGeneration(config).save_pretrained(folder)


WRONG: dict[str, Callable[[Path], None]] = {
    "diffusion": _diffusion,
    "encoder": _encoder,
    "classifier": _classifier,
    "sound": _sound,
}
