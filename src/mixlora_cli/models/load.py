"""From a `ModelConfig` to a base model that is ready to be adapted: a checkpoint of LLaVA class, `mini` or `tiny`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from mixlora_cli.config import ModelConfig
from mixlora_cli.config.groups import Quantization
from mixlora_cli.data.template import TEMPLATES, Template
from mixlora_cli.errors import UserError
from mixlora_cli.models.networks import register_models
from mixlora_cli.models.quantization import load_weights, require_bitsandbytes
from mixlora_cli.paths import cache_root

_HEAD_BYTES = 1 << 20
"""Of each weight file: enough for a safetensors header with every tensor's name, shape and place."""


@dataclass(frozen=True)
class LoadedModel:
    """A vision-language model of LLaVA class with every parameter frozen, in eval mode, and how to feed it."""

    model: PreTrainedModel
    """Has `.model.language_model`, `.model.vision_tower`, `.model.multi_modal_projector` and `.lm_head`."""
    tokenizer: PreTrainedTokenizerBase
    image_processor: Callable[..., Any]
    """`image_processor(images=[PIL], return_tensors="pt")["pixel_values"]` -> (n, 3, H, W)."""
    num_image_tokens: int
    """Tokens that one picture expands to in the sequence."""
    image_token_id: int
    template: Template
    name: str
    fingerprint: str
    """Hex digest that identifies weights and preprocessing, for caches and prediction files."""


def build_base(model: ModelConfig, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load the base model with frozen weights of `dtype`, in eval mode.

    Raises:
        UserError: weights or packages are missing, a model is not prepared, the checkpoint is not of LLaVA class, or
            the template is unknown.
    """
    # Bars of loading parts say nothing to a person, and PEFT's use of an old name is not the user's to mend.
    disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    if model.source == "mini":
        from mixlora_cli.models.mini import mini_base

        return _told_apart(mini_base(dtype, model.quantization), model.quantization)
    if model.source == "tiny":
        from mixlora_cli.models.tiny import build_tiny

        return build_tiny(model.template, dtype)
    require_prepared(model)
    return _told_apart(_load_checkpoint(model, checkpoint_source(model), dtype), model.quantization)


def _told_apart(loaded: LoadedModel, quantization: Quantization) -> LoadedModel:
    """With a fingerprint of its own where the weights are quantised."""
    if quantization == "none":
        return loaded
    digest = hashlib.sha256(f"{loaded.fingerprint} {quantization}".encode()).hexdigest()
    return replace(loaded, fingerprint=digest)


def checkpoint_source(model: ModelConfig) -> str:
    """The hub id or folder that a model's checkpoint is loaded from."""
    return str(prepared_folder(model)) if model.source == "prepared" else str(model.name_or_path)


def prepared_folder(model: ModelConfig) -> Path:
    """`model.name_or_path` where it is given, else `models/<name>` under the cache: `models/llava-v1-7b`."""
    if model.name_or_path is not None:
        return Path(model.name_or_path).expanduser()
    return cache_root() / "models" / model.name.replace("_", "-")


def require_prepared(model: ModelConfig) -> None:
    """Do nothing for a model that needs no preparation, or whose preparation is complete.

    Raises:
        UserError: it has not been prepared, or the package that quantises is missing; names the command that does it.
    """
    require_bitsandbytes(model.quantization)
    if model.source != "prepared":
        return
    folder = prepared_folder(model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model={model.name} is not in {folder}: assemble it once with `mixlora prepare model={model.name}`; "
            "if it is somewhere else, give model.name_or_path=<that folder> (or set MIXLORA_CACHE)"
        )


def _load_checkpoint(model: ModelConfig, source: str, dtype: torch.dtype) -> LoadedModel:
    """A LLaVA checkpoint with its processor."""
    if model.template not in TEMPLATES:
        raise UserError(f"model.template={model.template}: must be one of {', '.join(TEMPLATES)}")
    register_models()  # a saved copy of the small model is a checkpoint like any other
    revision = model.revision or "main"
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(_unreadable(source, error)) from error
    if not isinstance(config, LlavaConfig):
        raise UserError(
            f"model.name_or_path={source} is a {config.model_type} model; expected a LLaVA checkpoint (model_type "
            "llava), such as llava-hf/llava-1.5-7b-hf"
        )
    try:
        network = load_weights(
            AutoModelForImageTextToText,
            source,
            config,
            model.quantization,
            dtype,
            revision=revision,
            attn_implementation=model.attn_implementation,
        )
        processor = AutoProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(_unreadable(source, error)) from error
    return LoadedModel(
        model=network.requires_grad_(False).eval(),
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        num_image_tokens=num_image_tokens(config),
        image_token_id=network.config.image_token_id,
        template=TEMPLATES[model.template],
        name=source,
        fingerprint=checkpoint_fingerprint(network.config, source),
    )


def num_image_tokens(config: LlavaConfig) -> int:
    """Tokens of one picture: CLIP's CLS token is dropped by the `default` strategy and kept by `full`."""
    vision: Any = config.vision_config
    patches = int((vision.image_size // vision.patch_size) ** 2)
    has_cls = vision.model_type == "clip_vision_model"
    return patches + int(has_cls and config.vision_feature_select_strategy == "full")


def checkpoint_fingerprint(config: PreTrainedConfig, source: str) -> str:
    """Of a hub checkpoint its commit; of a local folder all settings and the heads of its weight files."""
    digest = hashlib.sha256(config.to_json_string().encode())
    digest.update(str(getattr(config, "_commit_hash", None)).encode())
    folder = Path(source)
    if folder.is_dir():
        for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
            digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_HEAD_BYTES))
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """What an error says, in a line; of torch's lists of mismatches the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def _unreadable(source: str, error: Exception) -> str:
    return (
        f"model.name_or_path={source} cannot be loaded: {first_line(error)} Give a Hugging Face id that this machine "
        "can reach, or a local folder with config.json, weights and processor files"
    )
