from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image

from mixlora_cli.prepare import leakage as prints
from mixlora_cli.prepare.leakage import Print, difference_bits, nearest, print_of, prints_of


def scene(seed: int, size: int = 96) -> Image.Image:
    coarse = Image.frombytes("RGB", (9, 9), random.Random(seed).randbytes(243))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def distance(one: Print, other: Print) -> int:
    return (int(one.perceptual, 16) ^ int(other.perceptual, 16)).bit_count()


def test_the_bits_say_which_neighbour_is_brighter() -> None:
    ramp = Image.fromarray(np.tile(np.arange(17, dtype=np.uint8) * 10, (16, 1)))
    assert difference_bits(ramp).all()
    assert not difference_bits(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).any()


def test_compression_and_size_change_few_bits_and_other_pictures_many(tmp_path: Path) -> None:
    scene(0).save(tmp_path / "a.png")
    scene(0).resize((70, 60)).save(tmp_path / "a.jpg", quality=60)
    scene(1).save(tmp_path / "b.png")
    a, small, b = (print_of(tmp_path / name) for name in ("a.png", "a.jpg", "b.png"))
    assert a.bytes_digest != small.bytes_digest
    assert distance(a, small) <= 10
    assert distance(a, b) > 60
    assert not a.is_plain


def test_plain_pictures_say_so_and_broken_ones_have_no_print(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), "white").save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no picture")
    assert print_of(tmp_path / "white.png").is_plain
    assert print_of(tmp_path / "text.png") is None


def test_nearest_is_the_smallest_of_all_pairs(monkeypatch) -> None:
    monkeypatch.setattr(prints, "_BLOCK", 3)
    source = random.Random(0)
    others = [source.randbytes(32).hex() for _ in range(20)]
    wanted = [*others[:3], *(source.randbytes(32).hex() for _ in range(8))]

    def bits(one: str, other: str) -> int:
        return (int(one, 16) ^ int(other, 16)).bit_count()

    expected = [min((bits(one, other), place) for place, other in enumerate(others)) for one in wanted]
    assert nearest(wanted, others) == [(place, least) for least, place in expected]
    assert nearest(wanted, others)[:3] == [(0, 0), (1, 0), (2, 0)]
    assert nearest(wanted, []) == []


def test_prints_are_remembered_until_the_picture_changes(tmp_path: Path, monkeypatch) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        scene(n).save(path)
    first = prints_of(paths, tmp_path, tmp_path / "cache", 2)
    made: list[str] = []
    monkeypatch.setattr(prints, "print_of", lambda path: made.append(path.name) or print_of(path))
    assert prints_of(paths, tmp_path, tmp_path / "cache", 1) == first
    assert made == []
    scene(7).save(paths[1])
    again = prints_of(paths, tmp_path, tmp_path / "cache", 1)
    assert (made, again[paths[1]] == first[paths[1]], again[paths[0]] == first[paths[0]]) == (
        ["1.png"],
        False,
        True,
    )
