"""Handwritten digits: scikit-learn's 8 x 8 pictures, enlarged."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from mixlora_cli.data.mini.canvas import SIZE

_SIDE = 8
_DARKEST = 16


@dataclass(frozen=True)
class Digit:
    """One handwritten digit."""

    label: int
    index: int
    """Its place in `sklearn.datasets.load_digits`."""
    ink: bytes
    """64 numbers from 0 (paper) to 16 (ink), row by row."""
    size: int
    """Side in pixels that it is drawn at, in the middle of the canvas, a free edge included."""


@lru_cache(maxsize=1)
def handwritten() -> tuple[tuple[tuple[int, bytes], ...], ...]:
    """For each digit 0 to 9 its (index, ink) pairs, in the data set's order."""
    from sklearn.datasets import load_digits  # a second of imports that only the planning process needs

    data = load_digits()
    groups: list[list[tuple[int, bytes]]] = [[] for _ in range(10)]
    for index, (ink, label) in enumerate(zip(data.images, data.target, strict=True)):
        groups[int(label)].append((index, bytes(int(value) for value in ink.ravel())))
    return tuple(tuple(group) for group in groups)


def render_digit(digit: Digit) -> Image.Image:
    """Dark ink on white paper, SIZE x SIZE pixels, RGB."""
    gray = bytes(255 - min(value * 255 // _DARKEST, 255) for value in digit.ink)
    paper = Image.new(
        "L", (_SIDE + 2, _SIDE + 2), 255
    )  # a free edge, or strokes at the border would end in a cut
    paper.paste(Image.frombytes("L", (_SIDE, _SIDE), gray), (1, 1))
    large = paper.resize((digit.size, digit.size), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    corner = (SIZE - digit.size) // 2
    picture.paste(large.convert("RGB"), (corner, corner))
    return picture
