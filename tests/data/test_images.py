from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from mixlora_cli.data import images as checks
from mixlora_cli.data.images import check_images, open_fully
from mixlora_cli.data.problems import BadRecord, Kind


def kind_of(path) -> Kind:
    with pytest.raises(BadRecord) as caught:
        open_fully(path)
    return caught.value.kind


def test_damage_of_every_sort(images) -> None:
    Image.effect_noise((64, 64), 80).save(images / "noise.jpg")
    whole = (images / "noise.jpg").read_bytes()
    (images / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_text("not a picture")
    (images / "empty.png").write_bytes(b"")
    flipped = bytearray((images / "red.png").read_bytes())
    flipped[-20] ^= 0xFF
    (images / "flipped.png").write_bytes(bytes(flipped))
    open_fully(images / "red.png")
    open_fully(images / "noise.jpg")
    for name in ("half.jpg", "text.png", "empty.png", "flipped.png"):
        assert kind_of(images / name) is Kind.CORRUPT_IMAGE, name


def test_a_picture_with_too_many_pixels_is_not_decoded(images, monkeypatch) -> None:
    monkeypatch.setattr(checks, "MAX_PIXELS", 47)
    with pytest.raises(BadRecord) as caught:
        open_fully(images / "red.png")
    assert caught.value.kind is Kind.HUGE_IMAGE
    assert caught.value.detail == "red.png has 8 x 6 pixels, at most 47 allowed"
    monkeypatch.setattr(checks, "MAX_PIXELS", 48)
    open_fully(images / "red.png")


def test_a_decompression_bomb(images, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert kind_of(images / "red.png") is Kind.HUGE_IMAGE


def test_what_opened_well_is_opened_once(images, own_cache, monkeypatch) -> None:
    (images / "bad.png").write_bytes(b"x")
    paths = [images / name for name in ("red.png", "bad.png", "blue.png", "red.png")]
    opened: list[str] = []

    def count(path) -> None:
        opened.append(path.name)
        open_fully(path)

    monkeypatch.setattr(checks, "open_fully", count)
    assert {path.name: problem.kind for path, problem in check_images(paths, images, own_cache).items()} == {
        "bad.png": Kind.CORRUPT_IMAGE
    }
    assert sorted(opened) == ["bad.png", "blue.png", "red.png"]
    opened.clear()
    check_images(paths, images, own_cache)
    assert opened == ["bad.png"]
    opened.clear()
    (images / "bad.png").write_bytes((images / "blue.png").read_bytes())
    os.utime(images / "red.png", ns=(1, 1))
    assert check_images(paths, images, own_cache) == {}
    assert sorted(opened) == ["bad.png", "red.png"]
    opened.clear()
    assert check_images(paths, images, own_cache) == {}
    assert opened == []


def test_a_damaged_memory_is_as_good_as_none(images, own_cache) -> None:
    check_images([images / "red.png"], images, own_cache)
    (store,) = (own_cache / "checked-images").iterdir()
    size, _ = json.loads(store.read_text())["red.png"]
    assert size == (images / "red.png").stat().st_size
    for text in ("{", "[]", '{"red.png": 3}'):
        store.write_text(text)
        assert check_images([images / "red.png"], images, own_cache) == {}
    assert list(json.loads(store.read_text())) == ["red.png"]


def test_a_picture_that_vanished_is_a_problem(images, own_cache) -> None:
    bad = check_images([images / "gone.png"], images, own_cache)
    assert bad[images / "gone.png"].detail == "gone.png: [Errno 2] No such file or directory: 'gone.png'"


def test_a_cache_that_cannot_be_written_is_no_error(images, tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert check_images([images / "red.png"], images, blocked) == {}


def test_what_was_checked_with_other_pixels_is_checked_again(images, own_cache, monkeypatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(checks, "open_fully", lambda path: opened.append(path.name))
    for pixels in ("1", "1", "2"):
        monkeypatch.setattr(checks, "PIXELS", pixels)
        check_images([images / "red.png"], images, own_cache)
    assert opened == ["red.png"] * 2
