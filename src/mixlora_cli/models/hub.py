"""Any Hugging Face checkpoint of LLaVA class, from the hub or a local folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    PreTrainedConfig,
)

from mixlora_cli.config import ModelConfig
from mixlora_cli.data.template import TEMPLATES
from mixlora_cli.errors import UserError
from mixlora_cli.models import linear_llava, tower
from mixlora_cli.models.base import Base

_HEAD_BYTES = (
    1 << 20
)  # of each weight file, enough for a safetensors header with every tensor's name, shape and place


def hub_base(model: ModelConfig, dtype: torch.dtype) -> Base:
    """Load a LLaVA checkpoint with its processor.

    Raises:
        UserError: it cannot be found or read, is of another class, or the template is unknown.
    """
    if model.template not in TEMPLATES:
        raise UserError(f"model.template={model.template}: must be one of {', '.join(TEMPLATES)}")
    assert model.name_or_path is not None
    tower.register()  # a saved copy of the small model is a checkpoint like any other
    linear_llava.register()
    source, revision = model.name_or_path, model.revision or "main"
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
        network = AutoModelForImageTextToText.from_pretrained(
            source, revision=revision, dtype=dtype, attn_implementation=model.attn_implementation
        )
        processor = AutoProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(_unreadable(source, error)) from error
    return Base(
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


def _unreadable(source: str, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"model.name_or_path={source} cannot be loaded: {reason} Give a Hugging Face id that this machine can reach, "
        "or a local folder with config.json, weights and processor files"
    )
