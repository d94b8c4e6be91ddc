"""What an adapter selects while it reads prompts: as generation does before its first new token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel

from mixlora_cli.data.collate import Collator
from mixlora_cli.data.encode import Item
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.method.selection import Selection

ADAPTER = "default"


def tuner_of(model: PeftModel) -> MixLoraModel:
    """The tuner of a model with a MixLoRA adapter."""
    tuner = model.base_model
    assert isinstance(tuner, MixLoraModel)
    return tuner


def selections_at_prompt(model: PeftModel, items: Sequence[Item], collate: Collator) -> dict[str, Selection]:
    """By layer name: the factors `index_a` and `index_b` (B, r) of one batch of B prompts, best first.

    Args:
        model: a base with its MixLoRA adapter, in eval mode.
        collate: makes generation batches: left padding, no labels.
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate(items).items()}
    with torch.inference_mode():
        # One token's logits: the head is the widest product, and nobody reads it.
        model(**batch, logits_to_keep=1, use_cache=False)
    return tuner_of(model).selections(ADAPTER)
