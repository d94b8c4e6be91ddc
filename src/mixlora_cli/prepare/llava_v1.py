"""LLaVA-v1 after stage one: LLaMA (Vicuna) + CLIP + one linear projector, written as a `LinearLlava` checkpoint.

The published projector was trained without special tokens around the picture (`mm_use_im_start_end False`,
`mm_use_im_patch_token False`: LLaVA's model zoo), on the patches of CLIP's last layer but one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
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
from mixlora_cli.errors import UserError
from mixlora_cli.models.networks import LinearLlava, LinearLlavaConfig
from mixlora_cli.prepare.parts import Part
from mixlora_cli.prepare.tokenizer import Vocabulary, build_vocabulary
from mixlora_cli.prepare.weight_files import read_weights
from mixlora_cli.progress import counting
from mixlora_cli.store import readable_as_usual, write_json

SHARD_BYTES = 4 * 10**9
_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_PROJECTOR = "model.multi_modal_projector.linear_1"
_PROJECTOR_FILE = "mm_projector.bin"
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What older checkpoints keep beside their weights, and CLIP's text side.
_LEFT_OUT = ("rotary_emb.inv_freq", "position_ids")
_CLIP_ONLY = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


@dataclass(frozen=True)
class LlavaV1:
    """The assembled model; its weights still lie in the files of its parts."""

    config: LinearLlavaConfig
    vocabulary: Vocabulary
    processor: LlavaProcessor
    weights: dict[str, Tensor]
    language_model: Part
    vision_tower: Part
    projector: Part

    @property
    def num_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights.values())

    def part_of(self, name: str) -> Part:
        """The part that a weight comes from."""
        if ".vision_tower." in name:
            return self.vision_tower
        return self.projector if name.startswith(_PROJECTOR) else self.language_model


def open_llava_v1(language_model: Part, vision_tower: Part, projector: Part) -> LlavaV1:
    """Put the parts together and check that they fit, before anything is written.

    Raises:
        UserError: a part is of another kind, incomplete or damaged, or does not fit the others.
    """
    text, vision = _text_config(language_model), _vision_config(vision_tower)
    weights = {
        re.sub(r"^model\.", "model.language_model.", name): weight
        for name, weight in _weights(language_model).items()
    }
    for name, weight in _weights(vision_tower).items():
        if not name.startswith(_CLIP_ONLY):
            weights[f"model.vision_tower.{name.removeprefix('vision_model.')}"] = weight
    weights |= _projector_weights(projector, vision.hidden_size, text.hidden_size)
    vocabulary = build_vocabulary(language_model, text.vocab_size)
    sizes: Any = vision
    config = LinearLlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=vocabulary.image_token_id,
        image_seq_length=(sizes.image_size // sizes.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        architectures=[LinearLlava.__name__],
    )
    processor = _processor(vision_tower, vision, vocabulary)
    model = LlavaV1(config, vocabulary, processor, weights, language_model, vision_tower, projector)
    _check_weights(model)
    for name in (_EMBEDDING, _HEAD):
        weights[name] = _extend(weights[name], vocabulary.num_rows)
    text.vocab_size = vocabulary.num_rows
    config.dtype = text.dtype = weights[_EMBEDDING].dtype
    return model


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
    config.name_or_path = ""  # a folder of this machine
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


def _projector_weights(part: Part, in_features: int, out_features: int) -> dict[str, Tensor]:
    """The published projector: one linear layer between the vision tower's and the language model's width."""
    file = part.path / _PROJECTOR_FILE if part.path.is_dir() else part.path
    if not file.is_file():
        raise part.refuse(
            f"{_PROJECTOR_FILE} is not in this folder; give the folder or the file of the published projector"
        )
    weights = {re.sub(r"^(model\.)?mm_projector\.", "", name): w for name, w in _read(part, file).items()}
    if any("embed_tokens" in name for name in weights):
        raise part.refuse(
            "this projector comes with token embeddings: it was trained with special tokens around the picture "
            "(mm_use_im_start_end), which no template here has"
        )
    if any(name.split(".")[0].isdigit() for name in weights):
        raise part.refuse(
            "this projector has several layers, as LLaVA-1.5's; LLaVA-v1 has one linear layer. "
            "For LLaVA-1.5 use model=llava_1_5_7b, which needs no preparation"
        )
    if set(weights) != {"weight", "bias"}:
        names = ", ".join(sorted(weights)[:4]) or "nothing"
        raise part.refuse(f"expected mm_projector.weight and mm_projector.bias, found {names}")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != {"weight": (out_features, in_features), "bias": (out_features,)}:
        raise part.refuse(
            f"found weight {shapes['weight']} and bias {shapes['bias']}, but the vision tower's {in_features} features "
            f"go to the language model's {out_features}: it was trained with other models than these"
        )
    return {f"{_PROJECTOR}.{name}": weight for name, weight in weights.items()}


def _weights(part: Part) -> dict[str, Tensor]:
    file = next((part.path / name for name in _WEIGHT_FILES if (part.path / name).is_file()), None)
    if file is None:
        raise part.refuse(f"{part.path} has no weights: expected one of {', '.join(_WEIGHT_FILES)}")
    return {name: weight for name, weight in _read(part, file).items() if not name.endswith(_LEFT_OUT)}


def _read(part: Part, file: Path) -> dict[str, Tensor]:
    try:
        return read_weights(file).tensors
    except UserError as error:
        raise part.refuse(str(error)) from error


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


def _check_weights(model: LlavaV1) -> None:
    """Do nothing where every tensor of the architecture is there, and no other."""
    with torch.device("meta"):
        expected = LinearLlava(model.config).state_dict()
    for name in sorted(expected.keys() | model.weights.keys()):
        refuse = model.part_of(name).refuse
        if name not in model.weights:
            raise refuse(f"its weight files lack {name}, which its config.json calls for")
        if name not in expected:
            raise refuse(f"its weight files hold {name}, which its config.json does not call for")
        found, shape = model.weights[name], expected[name].shape
        if found.shape != shape:
            raise refuse(f"{name} has shape {tuple(found.shape)}; its config.json calls for {tuple(shape)}")
        if not found.is_floating_point():
            raise refuse(f"{name} is {found.dtype}: quantised weights cannot be assembled")


def _extend(weight: Tensor, num_rows: int) -> Tensor:
    """Embedding or head (vocabulary, d) -> (num_rows, d); each new row is the mean of the others.

    A new token's logit is then the mean of all logits, so it is never the largest, and the new rows together get
    at most their share, num_new / vocabulary, of the probability of the others.
    """
    mean = weight.mean(dim=0, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(num_rows - len(weight), -1)])


def write_llava_v1(model: LlavaV1, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the checkpoint with tokenizer and image processor; no more than one shard need be in memory.

    Raises:
        UserError: a weight is not finite.
    """
    # Meta tensors, because tensors that are mapped from one file look as if they shared their memory.
    shapes = {name: weight.to("meta") for name, weight in model.weights.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    with counting("assembling", len(shapes)) as advance:
        for file, names in plan.filename_to_tensors.items():
            for name in names:
                if not bool(torch.isfinite(model.weights[name]).all()):
                    raise model.part_of(name).refuse(
                        f"{name} holds values that are not finite: the part is damaged; fetch it again"
                    )
                advance()
            shard = {name: model.weights[name].contiguous() for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            readable_as_usual(folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    model.processor.save_pretrained(folder)
    tokenizer = model.vocabulary.tokenizer
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=model.vocabulary.never_generated,
    ).save_pretrained(folder)
    model.config.save_pretrained(folder)
