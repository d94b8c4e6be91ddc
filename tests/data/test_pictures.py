"""Pictures in folders and in zip archives, read by several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from mixlora_cli.data.collate import PixelLoader
from mixlora_cli.data.images import check_images
from mixlora_cli.data.pictures import locate_picture, open_picture, read_picture, split_archive, stamp
from mixlora_cli.data.problems import BadRecord, Kind


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
