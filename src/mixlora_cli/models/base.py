"""A base model ready to be adapted: what every command needs to know of it, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixlora_cli.data.template import Template


@dataclass(frozen=True)
class Base:
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
