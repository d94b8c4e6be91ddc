"""Whether batches without a picture need a stand-in, so that no process waits for another's projector."""

from __future__ import annotations

from torch import nn
from transformers import TrainingArguments

from mixlora_cli.data.batches import EncodedDataset
from mixlora_cli.data.collate import Features
from mixlora_cli.data.stand_in import StandIn, build_stand_in
from mixlora_cli.models.base import Base


def stand_in_for_text(
    model: nn.Module,
    base: Base,
    dataset: EncodedDataset,
    features: Features,
    arguments: TrainingArguments,
) -> StandIn | None:
    """A stand-in where a text-only batch can occur and would leave out weights that all processes share; else None."""
    has_text = any(image is None for image in dataset.items.images)
    if has_text and (trains_beside_the_language_model(model) or _spreads_weights(arguments)):
        return build_stand_in(base.image_token_id, base.num_image_tokens, features)
    return None


def trains_beside_the_language_model(model: nn.Module) -> bool:
    """Whether a parameter of projector or tower is trained: a text-only batch gives it no gradient."""
    return any(
        parameter.requires_grad and "language_model" not in name and "lm_head" not in name
        for name, parameter in model.named_parameters()
    )


def _spreads_weights(arguments: TrainingArguments) -> bool:
    """ZeRO-3: each process holds a part of every weight and joins in when a layer that another one runs is gathered."""
    settings = getattr(arguments, "hf_deepspeed_config", None)
    return settings is not None and bool(settings.is_zero3())
