"""Tokenizer, template and number of image tokens of a model, where possible without its weights."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig, AutoTokenizer, LlavaConfig, PreTrainedTokenizerBase

from mixlora_cli.config import ModelConfig
from mixlora_cli.data.template import TEMPLATES, Template
from mixlora_cli.errors import UserError
from mixlora_cli.models import linear_llava, tower
from mixlora_cli.models.build import build_base
from mixlora_cli.models.hub import num_image_tokens
from mixlora_cli.models.prepared import prepared_folder, require_prepared


@dataclass(frozen=True)
class TextOnly:
    """What encoding needs of a base model; see `data.encode.TextSide`."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    num_image_tokens: int
    image_token_id: int


def text_side(model: ModelConfig) -> TextOnly:
    """The text side of a model; only the small built-in models are built whole.

    Raises UserError when it cannot be found or is no LLaVA model.
    """
    if model.source in ("mini", "tiny"):
        base = build_base(model)
        return TextOnly(base.tokenizer, base.template, base.num_image_tokens, base.image_token_id)
    require_prepared(model)
    tower.register()
    linear_llava.register()
    source = str(prepared_folder(model)) if model.source == "prepared" else str(model.name_or_path)
    revision = model.revision or "main"
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(
            f"the tokenizer of model.name_or_path={source} cannot be loaded: {reason}; check.lengths=false goes without"
        ) from error
    if not isinstance(config, LlavaConfig):
        raise UserError(
            f"model.name_or_path={source} is a {config.model_type} model; expected a LLaVA checkpoint"
        )
    return TextOnly(tokenizer, TEMPLATES[model.template], num_image_tokens(config), config.image_token_id)
