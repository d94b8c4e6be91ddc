"""Where things go in a picture: random places that keep every item on the canvas and apart from the others.

All numbers are pixels of the SIZE x SIZE canvas. Placing by cells, not by trial, keeps apart by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from mixlora_cli.data.mini.canvas import SIZE, Item, text_width
from mixlora_cli.data.mini.objects import BACKGROUNDS, COLOURS, MiniObject

MARGIN = 4
_LEFT, _RIGHT = (0, 0, SIZE // 2, SIZE), (SIZE // 2, 0, SIZE, SIZE)
TEXT_COLOURS = ("black", "red", "blue", "green", "purple", "brown")
"""Dark enough to be read on every background."""
PLACES = ("top left", "top right", "bottom left", "bottom right", "middle")


class Spot(NamedTuple):
    """Centre and side of a square."""

    x: int
    y: int
    size: int


def background(rng: Random) -> str:
    """Any background colour."""
    return rng.choice(tuple(BACKGROUNDS))


def colour_on(rng: Random, ground: str) -> str:
    """A colour that does not vanish on this background."""
    return rng.choice([colour for colour in COLOURS if colour != ground])


def anywhere(rng: Random, smallest: int = 56, largest: int = 112) -> Spot:
    """One square of random size somewhere on the canvas."""
    return _within(rng, (0, 0, SIZE, SIZE), smallest, largest)


def side_by_side(rng: Random) -> tuple[Spot, Spot]:
    """A square in the left half and one in the right half, at any height."""
    return _within(rng, _LEFT, 44, 66), _within(rng, _RIGHT, 44, 66)


def one_above_other(rng: Random) -> tuple[Spot, Spot]:
    """A square in the upper half and one in the lower half, anywhere across."""
    half = SIZE // 2
    return _within(rng, (0, 0, SIZE, half), 44, 66), _within(rng, (0, half, SIZE, SIZE), 44, 66)


def small_and_large(rng: Random) -> tuple[Spot, Spot]:
    """A small square and one of at least 1.5 times its side, the small one left or right of the large one."""
    small, large = rng.randint(30, 42), rng.randint(64, 72)
    one, other = (_LEFT, _RIGHT) if rng.random() < 0.5 else (_RIGHT, _LEFT)
    return _within(rng, one, small, small), _within(rng, other, large, large)


def row_of_three(rng: Random) -> tuple[Spot, Spot, Spot]:
    """Three squares from left to right, at about the same height."""
    y = rng.randint(36, SIZE - 36)
    left, middle, right = (
        Spot(x + rng.randint(-2, 2), y + rng.randint(-8, 8), rng.randint(40, 44)) for x in (28, 80, 132)
    )
    return left, middle, right


def quarters(rng: Random, count: int) -> list[Spot]:
    """Up to four squares, each in a quarter of its own, in random order."""
    return _cells(rng, count, 2, 44, 66)


def ninths(rng: Random, count: int) -> list[Spot]:
    """Up to nine squares, each in a ninth of its own, in random order."""
    return _cells(rng, count, 3, 36, 46)


def place(rng: Random, name: str) -> Spot:
    """A square at one of PLACES."""
    size = rng.randint(38, 44)
    if name == "middle":
        return Spot(80 + rng.randint(-3, 3), 80 + rng.randint(-3, 3), size)
    y = 28 if name.startswith("top") else SIZE - 28
    x = 28 if name.endswith("left") else SIZE - 28
    return Spot(x + rng.randint(-3, 3), y + rng.randint(-3, 3), size)


def thing(item: MiniObject, spot: Spot) -> Item:
    """An object at a spot."""
    return Item("object", item, *spot)


def things(items: Sequence[MiniObject], spots: Sequence[Spot]) -> tuple[Item, ...]:
    """Objects at spots, one each."""
    return tuple(thing(item, spot) for item, spot in zip(items, spots, strict=True))


def writing(
    rng: Random, text: str, size: tuple[int, int], box: tuple[int, int, int, int] = (0, 0, SIZE, SIZE)
) -> Item:
    """A text in a dark colour inside a box (left, top, right, bottom).

    Its height is drawn from `size`, and less where the text would be too wide.
    """
    left, top, right, bottom = box
    height = rng.randint(*size)
    while text_width(text, height) > right - left - 2 * MARGIN:
        height -= 1
    half = int(text_width(text, height) / 2) + 1
    x = rng.randint(left + MARGIN + half, max(left + MARGIN + half, right - MARGIN - half))
    y = rng.randint(top + MARGIN + height // 2, bottom - MARGIN - height // 2)
    return Item("text", text, x, y, height, rng.choice(TEXT_COLOURS))


def _cells(rng: Random, count: int, per_side: int, smallest: int, largest: int) -> list[Spot]:
    side = SIZE // per_side
    corners = [(column * side, row * side) for row in range(per_side) for column in range(per_side)]
    chosen = rng.sample(corners, count)
    return [_within(rng, (x, y, x + side, y + side), smallest, largest, margin=2) for x, y in chosen]


def _within(
    rng: Random, box: tuple[int, int, int, int], smallest: int, largest: int, margin: int = MARGIN
) -> Spot:
    left, top, right, bottom = box
    size = rng.randint(smallest, largest)
    reach = size // 2 + size % 2 + margin
    return Spot(rng.randint(left + reach, right - reach), rng.randint(top + reach, bottom - reach), size)
