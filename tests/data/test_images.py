"""Pictures in folders and in zip archives: where they are, what damage is found, what everything sees of them."""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixlora_cli.analysis.selections.page import shrunk
from mixlora_cli.data import images as module
from mixlora_cli.data.images import (
    as_shown,
    check_images,
    locate_picture,
    open_fully,
    open_picture,
    opened,
    read_picture,
    split_archive,
    stamp,
)
from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.prepare.leakage import print_of
from mixlora_cli.report.thumbnails import data_uri


def kind_of(path: Path) -> Kind:
    with pytest.raises(BadRecord) as caught:
        open_fully(path)
    return caught.value.kind


def test_damage_of_every_sort(images, own_cache) -> None:
    Image.effect_noise((64, 64), 80).save(images / "noise.jpg")
    whole = (images / "noise.jpg").read_bytes()
    flipped = bytearray((images / "red.png").read_bytes())
    flipped[-20] ^= 0xFF
    damaged = {
        "half.jpg": whole[: len(whole) // 2],
        "text.png": b"not a picture",
        "empty.png": b"",
        "flipped.png": bytes(flipped),
    }
    open_fully(images / "red.png")
    open_fully(images / "noise.jpg")
    for name, content in damaged.items():
        (images / name).write_bytes(content)
        assert kind_of(images / name) is Kind.CORRUPT_IMAGE, name
    bad = check_images([images / "gone.png"], images, own_cache)
    assert bad[images / "gone.png"].detail == "gone.png: [Errno 2] No such file or directory: 'gone.png'"


def test_a_picture_with_too_many_pixels_is_not_decoded(images, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 47)
    with pytest.raises(BadRecord, match=r"red\.png has 8 x 6 pixels, at most 47 allowed") as caught:
        open_fully(images / "red.png")
    assert caught.value.kind is Kind.HUGE_IMAGE
    monkeypatch.setattr(module, "MAX_PIXELS", 48)
    open_fully(images / "red.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # a decompression bomb
    assert kind_of(images / "red.png") is Kind.HUGE_IMAGE


def test_what_opened_well_is_opened_once(images, own_cache, monkeypatch) -> None:
    (images / "bad.png").write_bytes(b"x")
    paths = [images / name for name in ("red.png", "bad.png", "blue.png", "red.png")]
    opened: list[str] = []

    def count(path) -> None:
        opened.append(path.name)
        open_fully(path)

    def check() -> tuple[list[str], list[str]]:
        """The names that were opened, and the bad ones among them."""
        opened.clear()
        bad = check_images(paths, images, own_cache)
        assert {problem.kind for problem in bad.values()} <= {Kind.CORRUPT_IMAGE}
        return sorted(opened), [path.name for path in bad]

    monkeypatch.setattr(module, "open_fully", count)
    assert check() == (["bad.png", "blue.png", "red.png"], ["bad.png"])
    assert check() == (["bad.png"], ["bad.png"])
    (images / "bad.png").write_bytes((images / "blue.png").read_bytes())
    os.utime(images / "red.png", ns=(1, 1))
    assert check() == (["bad.png", "red.png"], [])
    assert check() == ([], [])
    monkeypatch.setattr(module, "PIXELS", "other")  # when files give other pixels, all is checked again
    assert check() == (["bad.png", "blue.png", "red.png"], [])


def test_a_memory_that_is_damaged_or_cannot_be_written_is_as_good_as_none(
    images, own_cache, tmp_path
) -> None:
    check_images([images / "red.png"], images, own_cache)
    (store,) = (own_cache / "checked-images").iterdir()
    size, _ = json.loads(store.read_text())["red.png"]
    assert size == (images / "red.png").stat().st_size
    for text in ("{", "[]", '{"red.png": 3}'):
        store.write_text(text)
        assert check_images([images / "red.png"], images, own_cache) == {}
    assert list(json.loads(store.read_text())) == ["red.png"]
    (tmp_path / "file").write_text("")
    assert check_images([images / "red.png"], images, tmp_path / "file") == {}


@pytest.fixture
def archive(images: Path, tmp_path: Path) -> Path:
    """pictures.zip with inner/red.png, inner/sub/blue.png and inner/cut.png; top.png beside `inner`."""
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.write(images / "red.png", "inner/red.png")
        opened.write(images / "blue.png", "inner/sub/blue.png")
        opened.mkdir("inner/empty")
        opened.writestr("inner/cut.png", (images / "red.png").read_bytes()[:50])
        opened.write(images / "red.png", "top.png")
    return path


def test_a_member_reads_like_its_file(archive: Path, images: Path, tmp_path: Path) -> None:
    assert split_archive(archive / "inner" / "red.png") == (archive, "inner/red.png")
    assert split_archive(archive) == (archive, "")
    assert split_archive(images / "red.png") is None
    (tmp_path / "folder.zip").mkdir()
    assert split_archive(tmp_path / "folder.zip" / "red.png") is None
    for inside, outside in (("inner/red.png", "red.png"), ("inner/sub/blue.png", "blue.png")):
        assert read_picture(archive / inside) == (images / outside).read_bytes()
        assert opened(archive / inside) == opened(images / outside)
    assert stamp(archive / "inner/red.png")[0] == (images / "red.png").stat().st_size
    assert stamp(archive / "inner/no.png") is None


@pytest.mark.parametrize(
    ("name", "folder", "found"),
    [
        ("red.png", "inner", "inner/red.png"),
        ("./sub/../red.png", "inner", "inner/red.png"),
        ("inner/red.png", "", "inner/red.png"),
        ("../top.png", "inner", Kind.ESCAPING_IMAGE),
        ("sub/../../top.png", "inner", Kind.ESCAPING_IMAGE),
        ("/inner/red.png", "inner", Kind.ESCAPING_IMAGE),
        ("no.png", "inner", Kind.MISSING_IMAGE),
        ("empty", "inner", Kind.MISSING_IMAGE),
        (".", "inner", Kind.MISSING_IMAGE),
        ("top.png", "inner", Kind.MISSING_IMAGE),
    ],
)
def test_names_are_found_and_kept_inside(archive: Path, name, folder, found) -> None:
    if isinstance(found, str):
        assert locate_picture(name, archive / folder) == archive / found
        return
    with pytest.raises(BadRecord) as caught:
        locate_picture(name, archive / folder)
    assert caught.value.kind is found


def test_damage_inside_an_archive(archive: Path, own_cache: Path) -> None:
    content = bytearray(archive.read_bytes())
    start = zipfile.ZipFile(archive).getinfo("inner/red.png").header_offset
    content[start + 30 + len("inner/red.png") + 20] ^= 0xFF
    archive.write_bytes(bytes(content))
    paths = [archive / "inner" / name for name in ("red.png", "sub/blue.png", "cut.png", "gone.png")]
    bad = check_images(paths, archive / "inner", own_cache)
    assert {path.name: problem.kind for path, problem in bad.items()} == dict.fromkeys(
        ("red.png", "cut.png", "gone.png"), Kind.CORRUPT_IMAGE
    )
    with pytest.raises(OSError, match=r"red\.png in pictures\.zip"):
        read_picture(paths[0])


def test_an_archive_that_was_replaced_is_read_anew(archive: Path, images: Path) -> None:
    before = read_picture(archive / "inner/red.png")
    with zipfile.ZipFile(archive, "w") as opened:
        opened.write(images / "blue.png", "inner/red.png")
    os.utime(archive, ns=(1, 1))
    assert read_picture(archive / "inner/red.png") == (images / "blue.png").read_bytes() != before


def test_forked_workers_do_not_disturb_each_other(tmp_path: Path) -> None:
    """They have the archive's directory from the parent, and a place of their own in the file."""
    path = tmp_path / "many.zip"
    contents = {f"{n}.bin": random.Random(n).randbytes(5000 + n) for n in range(40)}
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in contents.items():
            opened.writestr(name, content)
    assert read_picture(path / "0.bin") == contents["0.bin"]  # the parent opens it
    jobs = [path / name for name in contents] * 20
    with multiprocessing.get_context("fork").Pool(3) as pool:
        for job, content in zip(jobs, pool.map(read_picture, jobs, chunksize=1), strict=True):
            assert content == contents[job.name]


def shown_by_the_report(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data_uri(path).partition(",")[2]))).convert("RGB")


PLACES = [opened, shown_by_the_report, shrunk]
"""Everything that decodes a picture to RGB, besides the hashes of `mixlora check`."""

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
# corners (top left, top right, bottom right, bottom left) of the picture below, once its viewer has turned it
UPRIGHT = {
    1: "red lime blue white",
    2: "lime red white blue",
    3: "blue white red lime",
    4: "white blue lime red",
    5: "red white blue lime",
    6: "white red lime blue",
    7: "blue lime red white",
    8: "lime blue white red",
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize(("orientation", "corners"), UPRIGHT.items())
def test_a_picture_is_upright_everywhere(suffix: str, orientation: int, corners: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 48), "red")
    for colour, corner in (("lime", (32, 0)), ("blue", (32, 24)), ("white", (0, 24))):
        picture.paste(colour, (*corner, corner[0] + 32, corner[1] + 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if suffix == ".jpg" else {}
    path = tmp_path / f"photo{suffix}"
    picture.save(path, exif=exif, **options)
    width, height = (64, 48) if orientation < 5 else (48, 64)
    points = ((8, 8), (width - 8, 8), (width - 8, height - 8), (8, height - 8))
    for place in PLACES:
        found = place(path)
        assert found.size == (width, height)
        for point, colour in zip(points, corners.split(), strict=True):
            assert np.abs(np.subtract(found.getpixel(point), COLOURS[colour])).max() < 60, (point, colour)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_orientation_that_nobody_can_read_turns_nothing(tmp_path: Path) -> None:
    picture = Image.effect_noise((8, 6), 80).convert("RGB")
    picture.save(tmp_path / "odd.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff and so on")
    assert opened(tmp_path / "odd.png").tobytes() == picture.tobytes()


GREY = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))  # a ramp of 64 levels
RAMPS = {
    "g16.png": (GREY * 257.0).astype("<u2"),
    "g16.tif": (GREY * 257.0).astype("<u2"),
    "big_endian.tif": (GREY * 257.0).astype(">u2"),
    "g16.jp2": (GREY * 257.0).astype("<u2"),
    "i32.tif": (GREY * 257.0).astype("<i4"),
    "i32_of_8_bits.tif": GREY.astype("<i4"),
    "float.tif": (GREY / 255).astype("<f4"),
}


@pytest.mark.parametrize("name", RAMPS)
def test_deep_pictures_keep_their_levels(name: str, tmp_path: Path) -> None:
    Image.fromarray(RAMPS[name]).save(tmp_path / name)
    open_fully(tmp_path / name)
    for place in PLACES:
        found = np.asarray(place(tmp_path / name)).astype(int)
        assert found.shape == (48, 64, 3)
        # thumbnails are stored with losses
        assert np.abs(found - GREY[..., None]).max() <= (4 if place is shown_by_the_report else 0)


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (GREY.astype("<f4"), "from 0 to 255, expected 0 to 1;"),
        ((GREY - 1000.0).astype("<f4"), "from -1000 to -745, expected 0 to 1;"),
        (np.where(GREY == 0, np.nan, GREY / 255).astype("<f4"), "from nan to nan, expected 0 to 1;"),
        ((GREY * 1000.0).astype("<i4"), "from 0 to 255000, expected 0 to 65535;"),
        (GREY.astype("<i4") - 1, "from -1 to 254, expected 0 to 65535;"),
    ],
)
def test_a_brightness_without_a_known_range_is_a_problem(samples: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.tif"
    Image.fromarray(samples).save(path)
    with pytest.raises(BadRecord) as caught:
        open_fully(path)
    assert caught.value.kind is Kind.UNKNOWN_RANGE
    assert caught.value.detail == f"deep.tif has a brightness {told} save it as 8 bits"
    assert print_of(path) is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_pictures_are_what_pillow_makes_of_them(mode: str, tmp_path: Path) -> None:
    source = Image.frombytes("RGB", (9, 7), random.Random(mode).randbytes(189))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    source.convert(mode).save(path)
    with Image.open(path) as pillow:
        expected = pillow.convert("RGB").tobytes()
    with open_picture(path) as image:
        assert as_shown(image, path).convert("RGB").tobytes() == expected
    assert opened(path).tobytes() == expected
