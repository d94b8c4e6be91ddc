"""Frozen picture features, computed once: the tower's output is kept on disk.

The cache stores what the projector reads (before the projector, which may be trained), in half precision. An entry
depends on the tower, its number format, the kind of device, the picture and how picture files are read, and
on no run that came before.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mixlora_cli.data.collate import Features, PixelLoader, Rows
from mixlora_cli.data.images import PIXELS, Picture, read_picture
from mixlora_cli.models.load import LoadedModel
from mixlora_cli.paths import WITHOUT_FEATURES, cache_root, unusable
from mixlora_cli.store import atomic


class FeatureTower(nn.Module):
    """A vision tower that also accepts its own output: (n, 3, H, W) pictures or (n, tokens, channels) features."""

    def __init__(self, tower: PreTrainedModel, layer: int) -> None:
        super().__init__()
        self.tower = tower
        self.layer = layer
        self.config = tower.config

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """The tower's output; given features, an output that holds them at the layer that LLaVA reads."""
        if pixel_values.ndim == 4:
            output: BaseModelOutput = self.tower(pixel_values, **kwargs)
            return output
        length = -self.layer if self.layer < 0 else self.layer + 1
        return BaseModelOutput(last_hidden_state=pixel_values, hidden_states=(pixel_values,) * length)


def accept_features(model: PreTrainedModel) -> None:
    """Let the `pixel_values` of a model with a `vision_tower` hold tower features; once is enough."""
    if not isinstance(model.model.vision_tower, FeatureTower):
        layer = model.config.vision_feature_layer
        model.model.vision_tower = FeatureTower(model.model.vision_tower, layer)


def has_fixed_features(base: LoadedModel) -> bool:
    """Whether one feature tensor can stand for a picture.

    So it is where every picture has the same tokens and its pixel values are all that the model takes of it, and where
    the model reads one layer of a tower.
    """
    tower = getattr(base.model.base_model, "vision_tower", None)
    layer = getattr(base.model.config, "vision_feature_layer", None)
    if tower is None or not isinstance(layer, int) or not base.chat.fixed_size:
        return False
    taken, _ = base.chat.process([[Image.new("RGB", (32, 32))]])
    return set(taken) == {"pixel_values"} and taken["pixel_values"].ndim == 4


def choose_features(base: LoadedModel, cached: bool) -> Features:
    """Where batches take their pictures from: the cache of tower features if asked for and possible, else the files."""
    return FeatureCache(base) if cached and has_fixed_features(base) else PixelLoader(base.chat)


def pictures_from(cached: bool) -> str:
    """What a result says of where its model's pictures came from."""
    return "tower features, cached in fp16" if cached else "pixels"


class FeatureCache:
    """Pictures to tower features (n, tokens, channels), from disk where they are, else computed and stored.

    They are kept in fp16 whatever the tower computes in, and come back rounded to it: fp32 has a relative
    error of at most 2^-11, bf16 none (of numbers above 2^-14, fp16's smallest with all its digits).
    """

    def __init__(self, base: LoadedModel, root: Path | None = None) -> None:
        accept_features(base.model)
        self._tower: FeatureTower = base.model.model.vision_tower
        self._load = PixelLoader(base.chat)
        # In another number format, computed by another kind of device, or of other pixels, they are others.
        weight = next(self._tower.parameters())
        kind = f"{str(weight.dtype).removeprefix('torch.')}-{weight.device.type}-pixels{PIXELS}"
        self._folder = (root or cache_root()) / "features" / f"{base.fingerprint[:16]}-{kind}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unusable(self._folder, error, WITHOUT_FEATURES) from error
        self.num_computed = 0

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """Features in the tower's floating-point type, as `pixel_values`.

        Raises:
            UserError: they cannot be written. A broken picture raises what opening it raises.
        """
        pictures = [picture for row in rows for picture in row]
        files = [self._file(picture) for picture in pictures]
        missing = {file: picture for file, picture in zip(files, pictures, strict=True) if not file.is_file()}
        for file, picture in missing.items():
            features = self._compute(picture)
            try:
                with atomic(file, synced=False) as temp, temp.open("wb") as stream:
                    np.save(stream, features)
            except OSError as error:
                raise unusable(self._folder, error, WITHOUT_FEATURES) from error
        stacked = np.stack([np.load(file) for file in files])
        return {"pixel_values": torch.from_numpy(stacked).to(next(self._tower.parameters()).dtype)}

    def _file(self, picture: Picture) -> Path:
        key = hashlib.blake2b(read_picture(picture), digest_size=16).hexdigest()
        return self._folder / key[:2] / f"{key}.npy"

    def _compute(self, picture: Picture) -> npt.NDArray[np.float16]:
        """One picture alone, whatever autocast is on around it: nothing else that its features could depend on."""
        reference = next(self._tower.parameters())
        pixels = self._load([(picture,)])["pixel_values"].to(reference.device, reference.dtype)
        with torch.inference_mode(), torch.autocast(reference.device.type, enabled=False):
            output = self._tower.eval()(pixels, output_hidden_states=True, return_dict=True)
        self.num_computed += 1
        features: npt.NDArray[np.float16] = output.hidden_states[self._tower.layer][0].float().cpu().numpy()
        return features.astype(np.float16)
