"""LLaVA-v1 as a transformers model: `LlavaForConditionalGeneration` whose projector is one linear layer.

A model type of its own, so that a transformers that does not know it refuses the checkpoint instead of filling the
second layer that is not there with random numbers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration


class LinearLlavaConfig(LlavaConfig):
    """A `LlavaConfig`; `projector_hidden_act` means nothing here."""

    model_type = "llava_linear"


class LinearProjector(nn.Module):
    """Picture features (n, tokens, d_vision) -> embeddings of the language model (n, tokens, d)."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        text: Any = config.text_config
        vision: Any = config.vision_config
        # Named like the first of transformers' two layers: code that asks for the projector's input finds it.
        self.linear_1 = nn.Linear(vision.hidden_size, text.hidden_size, bias=config.multimodal_projector_bias)

    def forward(self, image_features: Tensor) -> Tensor:
        """W x + b."""
        projected: Tensor = self.linear_1(image_features)
        return projected


class LinearLlava(LlavaForConditionalGeneration):
    """LLaVA with a `LinearProjector`; everything else is transformers' own."""

    config_class = LinearLlavaConfig
    config: LinearLlavaConfig

    def __init__(self, config: LinearLlavaConfig) -> None:
        super().__init__(config)
        projector: Any = LinearProjector(config)
        self.model.multi_modal_projector = projector


def register() -> None:
    """Make transformers' Auto classes know the model; calling it again changes nothing."""
    AutoConfig.register(LinearLlavaConfig.model_type, LinearLlavaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(LinearLlavaConfig, LinearLlava, exist_ok=True)
