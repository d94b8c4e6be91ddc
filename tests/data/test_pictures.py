"""Pictures in folders and in zip archives, read by several processes at once."""

from __future__ import annotations

import base64
import io
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
from mixlora_cli.data.collate import PixelLoader
from mixlora_cli.data.images import (
    as_shown,
    check_images,
    locate_picture,
    open_fully,
    open_picture,
    read_picture,
    split_archive,
    stamp,
)
from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.prepare.leakage import print_of
from mixlora_cli.report.thumbnails import data_uri


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


def kind_of(name: str, folder: Path) -> Kind:
    with pytest.raises(BadRecord) as caught:
        locate_picture(name, folder)
    return caught.value.kind


def test_split_archive(archive: Path, images: Path, tmp_path: Path) -> None:
    assert split_archive(archive / "inner" / "red.png") == (archive, "inner/red.png")
    assert split_archive(archive) == (archive, "")
    assert split_archive(images / "red.png") is None
    folder = tmp_path / "folder.zip"
    folder.mkdir()
    assert split_archive(folder / "red.png") is None


def test_a_member_reads_like_its_file(archive: Path, images: Path) -> None:
    for inside, outside in (("inner/red.png", "red.png"), ("inner/sub/blue.png", "blue.png")):
        assert read_picture(archive / inside) == (images / outside).read_bytes()
        with open_picture(archive / inside) as one, open_picture(images / outside) as other:
            assert (one.size, one.convert("RGB").tobytes()) == (other.size, other.convert("RGB").tobytes())
    assert stamp(archive / "inner/red.png")[0] == (images / "red.png").stat().st_size
    assert stamp(archive / "inner/no.png") is None


def test_names_are_found_and_kept_inside(archive: Path) -> None:
    inner = archive / "inner"
    assert locate_picture("red.png", inner) == inner / "red.png"
    assert locate_picture("./sub/../red.png", inner) == inner / "red.png"
    assert locate_picture("inner/red.png", archive) == inner / "red.png"
    assert kind_of("../top.png", inner) is Kind.ESCAPING_IMAGE
    assert kind_of("sub/../../top.png", inner) is Kind.ESCAPING_IMAGE
    assert kind_of("/inner/red.png", inner) is Kind.ESCAPING_IMAGE
    assert kind_of("no.png", inner) is Kind.MISSING_IMAGE
    assert kind_of("empty", inner) is Kind.MISSING_IMAGE
    assert kind_of("top.png", inner) is Kind.MISSING_IMAGE


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
    """They share the open file of the parent; each has its own place in it."""
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


def test_the_pixel_loader_reads_members(archive: Path, images: Path) -> None:
    from mixlora_cli.models.tiny import build_tiny

    load = PixelLoader(build_tiny().image_processor)
    assert load([archive / "inner/red.png"]).equal(load([images / "red.png"]))
    with Image.open(images / "red.png") as image:
        assert image.size == (8, 6)


def seen_by_the_model(path: Path) -> Image.Image:
    seen: list[Image.Image] = []

    def processor(images: list[Image.Image], return_tensors: str) -> dict[str, Any]:
        seen.extend(images)
        return {"pixel_values": None}

    PixelLoader(processor)([path])
    return seen[0]


def shown_by_the_report(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data_uri(path).partition(",")[2]))).convert("RGB")


PLACES = [seen_by_the_model, shown_by_the_report, shrunk]
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


def turned(path: Path, orientation: int) -> Path:
    """64 x 48 with a colour in each corner, and the EXIF tag that says how it was held."""
    picture = Image.new("RGB", (64, 48), "red")
    for colour, corner in (("lime", (32, 0)), ("blue", (32, 24)), ("white", (0, 24))):
        picture.paste(colour, (*corner, corner[0] + 32, corner[1] + 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    picture.save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize(("orientation", "corners"), UPRIGHT.items())
def test_a_picture_is_upright_everywhere(
    place: Any, suffix: str, orientation: int, corners: str, tmp_path: Path
) -> None:
    found = place(turned(tmp_path / f"photo{suffix}", orientation))
    width, height = (64, 48) if orientation < 5 else (48, 64)
    assert found.size == (width, height)
    left, right, top, bottom = 8, width - 8, 8, height - 8
    places = ((left, top), (right, top), (right, bottom), (left, bottom))
    for point, colour in zip(places, corners.split(), strict=True):
        assert np.abs(np.subtract(found.getpixel(point), COLOURS[colour])).max() < 60, (point, colour)


def test_a_turned_picture_is_known_as_the_upright_one(tmp_path: Path) -> None:
    noise = Image.frombytes("RGB", (12, 9), random.Random(0).randbytes(324)).resize((96, 72))
    noise.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "held.png", exif=exif)
    assert print_of(tmp_path / "held.png").perceptual == print_of(tmp_path / "upright.png").perceptual


def test_an_orientation_that_nobody_can_read_turns_nothing(tmp_path: Path) -> None:
    picture = Image.effect_noise((8, 6), 80).convert("RGB")
    picture.save(tmp_path / "odd.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff and so on")
    assert seen_by_the_model(tmp_path / "odd.png").tobytes() == picture.tobytes()


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


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", RAMPS)
def test_deep_pictures_keep_their_levels(name: str, place: Any, tmp_path: Path) -> None:
    Image.fromarray(RAMPS[name]).save(tmp_path / name)
    open_fully(tmp_path / name)
    found = np.asarray(place(tmp_path / name)).astype(int)
    assert found.shape == (48, 64, 3)
    # thumbnails are stored with losses
    assert np.abs(found - GREY[..., None]).max() <= (4 if place is shown_by_the_report else 0)


def test_deep_pictures_have_the_hash_of_shallow_ones(tmp_path: Path) -> None:
    noise = np.asarray(Image.effect_noise((64, 64), 80))
    Image.fromarray(noise).save(tmp_path / "8.png")
    Image.fromarray(noise.astype("<u2") * 257).save(tmp_path / "16.png")
    assert print_of(tmp_path / "16.png").perceptual == print_of(tmp_path / "8.png").perceptual


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
def test_a_brightness_without_a_known_range_is_a_problem(
    samples: Any, told: str, tmp_path: Path, own_cache: Path
) -> None:
    path = tmp_path / "deep.tif"
    Image.fromarray(samples).save(path)
    problem = check_images([path], tmp_path, own_cache)[path]
    assert problem.kind is Kind.UNKNOWN_RANGE
    assert problem.detail == f"deep.tif has a brightness {told} save it as 8 bits"
    assert print_of(path) is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_pictures_are_what_pillow_makes_of_them(mode: str, tmp_path: Path) -> None:
    source = Image.frombytes("RGB", (9, 7), random.Random(mode).randbytes(189))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    source.convert(mode).save(path)
    with Image.open(path) as pillow:
        expected = pillow.convert("RGB")
    with open_picture(path) as opened:
        assert as_shown(opened, path).convert("RGB").tobytes() == expected.tobytes()
    assert seen_by_the_model(path).tobytes() == expected.tobytes()
