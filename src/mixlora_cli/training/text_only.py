"""Whether batches without a picture need a dummy image, so that no process waits for another's projector."""

from __future__ import annotations

from torch import nn
from transformers import TrainingArguments

from mixlora_cli.data.collate import DummyImage, Features, build_dummy_image
from mixlora_cli.data.encode import EncodedDataset
from mixlora_cli.models.base import Base


def dummy_image_for_text(
    model: nn.Module,
    base: Base,
    dataset: EncodedDataset,
    features: Features,
    arguments: TrainingArguments,
) -> DummyImage | None:
    """A dummy image where a text-only batch can occur and would leave out weights that processes share; else None."""
    has_text = any(item.image is None for item in dataset.items)
    if has_text and (trains_beside_the_language_model(model) or _spreads_weights(arguments)):
        return build_dummy_image(base.image_token_id, base.num_image_tokens, features)
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
