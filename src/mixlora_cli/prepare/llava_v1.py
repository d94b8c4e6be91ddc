"""LLaVA-v1 after stage one: LLaMA (Vicuna) + CLIP + one linear projector, written as a `LinearLlava` checkpoint.

The published projector was trained without special tokens around the picture (`mm_use_im_start_end False`,
`mm_use_im_patch_token False`: LLaVA's model zoo), on the patches of CLIP's last layer but one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedConfig,
)

from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.models.networks import LinearLlava, LinearLlavaConfig
from mixlora_cli.prepare.parts import Part
from mixlora_cli.prepare.projector import read_projector
from mixlora_cli.prepare.shards import SHARD_BYTES, num_bytes, write_shards
from mixlora_cli.prepare.vocabulary import Vocabulary, build_vocabulary, extend
from mixlora_cli.prepare.weights import read_weights

_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_PROJECTOR = "model.multi_modal_projector.linear_1"
# What older checkpoints keep beside their weights, and CLIP's text side.
_LEFT_OUT = ("rotary_emb.inv_freq", "position_ids")
_CLIP_ONLY = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


@dataclass(frozen=True)
class LlavaV1:
    """The assembled model, its weights still in the files of its parts."""

    config: LinearLlavaConfig
    vocabulary: Vocabulary
    processor: LlavaProcessor
    sources: dict[str, Tensor]
    """By the assembled model's names; embedding and head not yet extended."""
    language_model: Part
    vision_tower: Part
    projector: Part

    @property
    def shapes(self) -> dict[str, Tensor]:
        """Every tensor as it will be written, on the meta device."""
        return {
            name: torch.empty(
                (self.vocabulary.num_rows, source.shape[1]) if name in (_EMBEDDING, _HEAD) else source.shape,
                dtype=source.dtype,
                device="meta",
            )
            for name, source in self.sources.items()
        }

    @property
    def num_bytes(self) -> int:
        """Size of the weights on disk."""
        return num_bytes(self.shapes)

    def tensor(self, name: str) -> Tensor:
        """Values of one tensor.

        Raises:
            UserError: they are not finite.
        """
        source = self.sources[name]
        values = extend(source, self.vocabulary.num_rows) if name in (_EMBEDDING, _HEAD) else source
        if not bool(torch.isfinite(values).all()):
            raise self._part(name).refuse(
                f"{name} holds values that are not finite: the part is damaged; fetch it again"
            )
        return values

    def check(self) -> None:
        """Do nothing where every tensor of the architecture is there, and no other.

        Raises:
            UserError: one is missing, unknown, of another shape or not in floating point.
        """
        expected = _skeleton(self.config)
        for name in sorted(expected.keys() | self.sources.keys()):
            refuse = self._part(name).refuse
            if name not in self.sources:
                raise refuse(f"its weight files lack {name}, which its config.json calls for")
            if name not in expected:
                raise refuse(f"its weight files hold {name}, which its config.json does not call for")
            found, shape = self.sources[name], expected[name].shape
            if found.shape != shape:
                raise refuse(
                    f"{name} has shape {tuple(found.shape)}; its config.json calls for {tuple(shape)}"
                )
            if not found.is_floating_point():
                raise refuse(f"{name} is {found.dtype}: quantised weights cannot be assembled")

    def _part(self, name: str) -> Part:
        if ".vision_tower." in name:
            return self.vision_tower
        return self.projector if name.startswith(_PROJECTOR) else self.language_model


def open_llava_v1(language_model: Part, vision_tower: Part, projector: Part) -> LlavaV1:
    """Put the parts together and check that they fit, before anything is written.

    Raises:
        UserError: a part is of another kind, incomplete or damaged, or does not fit the others.
    """
    text, vision = _text_config(language_model), _vision_config(vision_tower)
    sources = _language_weights(language_model) | _vision_weights(vision_tower)
    for name, tensor in read_projector(projector, vision.hidden_size, text.hidden_size).items():
        sources[f"{_PROJECTOR}.{name}"] = tensor
    vocabulary = build_vocabulary(language_model, text.vocab_size)
    model = LlavaV1(
        config=_config(text, vision, vocabulary.image_token_id),
        vocabulary=vocabulary,
        processor=_processor(vision_tower, vision, vocabulary),
        sources=sources,
        language_model=language_model,
        vision_tower=vision_tower,
        projector=projector,
    )
    model.check()
    text.vocab_size = vocabulary.num_rows
    model.config.dtype = text.dtype = sources[_EMBEDDING].dtype
    return model


def write_llava_v1(
    model: LlavaV1, folder: Path, advance: Callable[[int], None], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the checkpoint with tokenizer and image processor; `advance` is told the bytes that were read.

    Raises:
        UserError: a weight is not finite.
    """

    def read(name: str) -> Tensor:
        values = model.tensor(name)
        advance(values.numel() * values.element_size())
        return values

    write_shards(folder, model.shapes, read, shard_bytes)
    model.processor.save_pretrained(folder)
    tokenizer = model.vocabulary.tokenizer
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=model.vocabulary.never_generated,
    ).save_pretrained(folder)
    model.config.save_pretrained(folder)


def _text_config(part: Part) -> LlamaConfig:
    config = _read_config(part)
    if not isinstance(config, LlamaConfig):
        raise part.refuse(
            f"is a {config.model_type} model; expected model_type llama, such as lmsys/vicuna-7b-v1.3"
        )
    if config.tie_word_embeddings:
        raise part.refuse(
            "its head is tied to its embedding; expected a LLaMA with a head of its own, such as Vicuna"
        )
    return config


def _vision_config(part: Part) -> CLIPVisionConfig:
    config = _read_config(part)
    vision = getattr(config, "vision_config", config)
    if not isinstance(vision, CLIPVisionConfig):
        raise part.refuse(
            f"is a {config.model_type} model; expected CLIP, such as openai/clip-vit-large-patch14"
        )
    return vision


def _read_config(part: Part) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(part.path)
    except (OSError, ValueError) as error:
        raise part.refuse(
            "must be a folder with a model in Hugging Face's layout; its config.json cannot be read"
        ) from error
    return config


def _language_weights(part: Part) -> dict[str, Tensor]:
    weights = read_weights(part)
    named = {name: tensor for name, tensor in weights.items() if not name.endswith(_LEFT_OUT)}
    return {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
        for name, tensor in named.items()
    }


def _vision_weights(part: Part) -> dict[str, Tensor]:
    weights = read_weights(part)
    return {
        f"model.vision_tower.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in weights.items()
        if not name.startswith(_CLIP_ONLY) and not name.endswith(_LEFT_OUT)
    }


def _skeleton(config: LinearLlavaConfig) -> dict[str, Tensor]:
    """Names and shapes that the parts must have."""
    with torch.device("meta"):
        return LinearLlava(config).state_dict()


def _config(text: LlamaConfig, vision: CLIPVisionConfig, image_token_id: int) -> LinearLlavaConfig:
    text.name_or_path = ""  # a folder of this machine
    sizes: Any = vision
    return LinearLlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_id,
        image_seq_length=(sizes.image_size // sizes.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        architectures=[LinearLlava.__name__],
    )


def _processor(part: Part, vision: CLIPVisionConfig, vocabulary: Vocabulary) -> LlavaProcessor:
    try:
        images = CLIPImageProcessorPil.from_pretrained(part.path)
    except (OSError, ValueError) as error:
        raise part.refuse("its preprocessor_config.json is missing or cannot be read") from error
    return LlavaProcessor(
        image_processor=images,
        tokenizer=vocabulary.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which `default` drops
        image_token=IMAGE_MARKER,
    )
