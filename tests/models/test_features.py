"""Cached tower features give what the pictures themselves give."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixlora_cli.data.collate import Features, PixelLoader
from mixlora_cli.errors import UserError
from mixlora_cli.models import features
from mixlora_cli.models.features import FeatureCache, choose_features, has_fixed_features
from mixlora_cli.models.tiny import build_tiny


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    noise = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return paths


def values(features: Features, pictures: list[Path]) -> torch.Tensor:
    return features([(picture,) for picture in pictures])["pixel_values"]


def test_features_stand_for_pictures(pictures: list[Path], tmp_path: Path) -> None:
    base = build_tiny()
    pixels = values(PixelLoader(base.chat), pictures)
    ids = torch.tensor([[base.chat.image_token_ids[0]] * len(base.chat.picture_tokens) + [40, 41]] * 3)
    with torch.inference_mode():
        expected = base.model(input_ids=ids, pixel_values=pixels).logits
        cache = FeatureCache(base, tmp_path / "cache")
        features = values(cache, pictures)
        got = base.model(input_ids=ids, pixel_values=features).logits
        still = base.model(input_ids=ids, pixel_values=pixels).logits
    assert features.ndim == 3
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=5e-3)  # stored in half precision
    torch.testing.assert_close(still, expected, atol=0, rtol=0)


def test_each_picture_is_computed_once_whatever_its_name(pictures: list[Path], tmp_path: Path) -> None:
    cache = FeatureCache(build_tiny(), tmp_path / "cache")
    first = values(cache, pictures)
    assert cache.num_computed == 3
    copy = tmp_path / "copy.png"
    copy.write_bytes(pictures[1].read_bytes())
    again = FeatureCache(build_tiny(), tmp_path / "cache")
    second = values(again, [copy, pictures[0]])
    assert again.num_computed == 0
    assert torch.equal(second, first[[1, 0]])
    assert not list(tmp_path.rglob("*.partial"))


def test_another_number_format_has_its_own_features(pictures: list[Path], tmp_path: Path) -> None:
    exact = build_tiny()
    rounded = replace(build_tiny(dtype=torch.bfloat16), fingerprint=exact.fingerprint)
    alone = values(FeatureCache(rounded, tmp_path / "alone"), pictures)
    values(FeatureCache(exact, tmp_path / "cache"), pictures)
    after = FeatureCache(rounded, tmp_path / "cache")
    assert torch.equal(values(after, pictures), alone)
    assert after.num_computed == 3


def test_features_of_other_pixels_are_not_read(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values(FeatureCache(build_tiny(), tmp_path / "cache"), pictures)
    monkeypatch.setattr(features, "PIXELS", "another")
    cache = FeatureCache(build_tiny(), tmp_path / "cache")
    values(cache, pictures)
    assert cache.num_computed == 3


def test_what_comes_back_is_what_the_tower_gives_rounded_to_fp16(
    pictures: list[Path], tmp_path: Path
) -> None:
    for dtype, exact in ((torch.float32, False), (torch.bfloat16, True)):
        base = build_tiny(dtype=dtype)
        found = values(FeatureCache(base, tmp_path / "cache"), pictures)
        pixels = values(PixelLoader(base.chat), pictures).to(dtype)
        with torch.inference_mode():
            tower, layer = base.model.model.vision_tower.tower, base.model.model.vision_tower.layer
            states = [tower(one[None], output_hidden_states=True).hidden_states[layer] for one in pixels]
        given = torch.cat(states)
        assert found.dtype == dtype
        assert torch.equal(found, given.half().to(dtype))
        normal = given.abs() > 2**-14
        assert torch.equal(found[normal], given[normal]) == exact
        assert ((found[normal] - given[normal]).abs() <= 2**-11 * given[normal].abs()).all()


def test_pictures_are_computed_one_by_one_and_without_autocast(pictures: list[Path], tmp_path: Path) -> None:
    base, seen = build_tiny(), []
    cache = FeatureCache(base, tmp_path / "cache")
    tower = base.model.model.vision_tower.tower

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: Any) -> None:
        seen.append((len(inputs[0]), output.last_hidden_state.dtype))

    tower.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        values(cache, pictures)
    assert seen == [(1, torch.float32)] * 3


def test_batches_with_some_pictures_known_keep_their_order(pictures: list[Path], tmp_path: Path) -> None:
    cache = FeatureCache(build_tiny(), tmp_path / "cache")
    middle = values(cache, [pictures[1]])
    every = values(cache, pictures)
    assert cache.num_computed == 3
    torch.testing.assert_close(every[1], middle[0], atol=0, rtol=0)
    assert not torch.equal(every[0], every[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda base: setattr(base.model.config, "vision_feature_layer", [-2, -1]),
        lambda base: setattr(base.chat.processor.image_processor, "do_center_crop", False),
        lambda base: setattr(base.model.model, "vision_tower", None),
    ],
    ids=["layers are joined", "the size differs", "no tower"],
)
def test_a_model_without_fixed_features_takes_pixels(change, tmp_path: Path) -> None:
    base = build_tiny()
    assert has_fixed_features(base)
    other = build_tiny()
    change(other)
    assert isinstance(choose_features(other, cached=True), PixelLoader)
    assert isinstance(choose_features(base, cached=False), PixelLoader)


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = FeatureCache(build_tiny(), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(UserError, match="No space left on device; free some space, set MIXLORA_CACHE"):
            values(cache, pictures)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert values(cache, pictures).shape[0] == 3
