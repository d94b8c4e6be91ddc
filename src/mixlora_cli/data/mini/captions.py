"""Pictures with rich captions for stage one: names, positions, numbers, colours, sizes, shapes, flags, written words.

The caption stage sees every object, but in pictures of its own: no evaluation picture is among them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mixlora_cli.data.mini.canvas import SIZE, Item, Scene, text_width
from mixlora_cli.data.mini.objects import (
    BACKGROUNDS,
    COLOURS,
    FLAGS,
    NUMBER_WORDS,
    MiniObject,
    all_objects,
    capitalised,
    shapes,
    with_article,
    words,
)

PROMPTS = (
    "Describe the picture.",
    "What is in the picture?",
    "Describe the image briefly.",
    "What does the image show?",
)


@dataclass(frozen=True)
class Captioned:
    """A scene with its caption and the names of the objects in it."""

    scene: Scene
    caption: str
    names: tuple[str, ...]


class _Cell(NamedTuple):
    """One cell of a grid over the canvas: its name and centre in pixels."""

    name: str
    x: int
    y: int


NINTHS = tuple(
    _Cell(" ".join(filter(None, (row, column))) or "middle", SIZE * (2 * j + 1) // 6, SIZE * (2 * i + 1) // 6)
    for i, row in enumerate(("top", "", "bottom"))
    for j, column in enumerate(("left", "", "right"))
)
"""Cells of three rows of three, in reading order."""
_QUARTERS = tuple(
    _Cell(f"{row} {column}", SIZE * (2 * j + 1) // 4, SIZE * (2 * i + 1) // 4)
    for i, row in enumerate(("top", "bottom"))
    for j, column in enumerate(("left", "right"))
)


def plural(name: str) -> str:
    """Regular plural: `cat` -> `cats`, `cross` -> `crosses`; a name that is a plural already (`grapes`) stays."""
    if name.endswith(("ss", "sh", "ch", "x")):
        return f"{name}es"
    return name if name.endswith("s") else f"{name}s"


def _object_item(rng: random.Random, thing: MiniObject, x: int, y: int, size: int) -> Item:
    return Item("object", thing, x + rng.randint(-4, 4), y + rng.randint(-4, 4), size)


def _single(rng: random.Random) -> tuple[list[Item], str]:
    thing = rng.choice(all_objects())
    size = rng.randint(70, 140)
    low, high = size // 2, SIZE - size // 2
    item = Item("object", thing, rng.randint(low, high), rng.randint(low, high), size)
    return [item], f"{with_article(thing.name)}."


def _placed(rng: random.Random) -> tuple[list[Item], str]:
    cell, thing = rng.choice(NINTHS), rng.choice(all_objects())
    item = _object_item(rng, thing, cell.x, cell.y, rng.randint(40, 52))
    return [item], f"{with_article(thing.name)} at the {cell.name}."


def _beside(rng: random.Random) -> tuple[list[Item], str]:
    first, second = rng.sample(all_objects(), 2)
    size, offset = rng.randint(50, 76), rng.randint(-24, 24)
    near, far = SIZE // 4, 3 * SIZE // 4
    beside = rng.random() < 0.5
    places = [(near, 80 + offset), (far, 80 - offset)]
    if not beside:
        places = [(y, x) for x, y in places]
    items = [
        _object_item(rng, thing, *place, size) for thing, place in zip((first, second), places, strict=True)
    ]
    one, other = with_article(first.name), with_article(second.name)
    return items, f"{one} on the left and {other} on the right." if beside else f"{one} above {other}."


def _corners(rng: random.Random) -> tuple[list[Item], str]:
    cells = sorted(rng.sample(range(4), rng.randint(3, 4)))
    things = rng.sample(all_objects(), len(cells))
    items, parts = [], []
    for index, thing in zip(cells, things, strict=True):
        cell = _QUARTERS[index]
        items.append(_object_item(rng, thing, cell.x, cell.y, rng.randint(50, 70)))
        parts.append(f"{cell.name}: {thing.name}")
    return items, ", ".join(parts) + "."


def _scatter(rng: random.Random, count: int) -> list[_Cell]:
    """Distinct cells in reading order."""
    return [NINTHS[index] for index in sorted(rng.sample(range(9), count))]


def _count_objects(rng: random.Random) -> tuple[list[Item], str]:
    count, thing = rng.randint(1, 6), rng.choice(all_objects())
    items = [_object_item(rng, thing, cell.x, cell.y, rng.randint(38, 50)) for cell in _scatter(rng, count)]
    return items, f"{NUMBER_WORDS[count]} {thing.name if count == 1 else plural(thing.name)}."


def _count_shapes(rng: random.Random) -> tuple[list[Item], str]:
    count, shape, colour = rng.randint(1, 6), rng.choice(shapes()), rng.choice(tuple(COLOURS))
    items = [
        Item("shape", shape, cell.x, cell.y, rng.randint(26, 44), colour) for cell in _scatter(rng, count)
    ]
    return items, f"{NUMBER_WORDS[count]} {colour} {shape if count == 1 else plural(shape)}."


def _shapes(rng: random.Random) -> tuple[list[Item], str]:
    items, parts = [], []
    for cell in _scatter(rng, rng.randint(1, 3)):
        shape, colour = rng.choice(shapes()), rng.choice(tuple(COLOURS))
        size, sizes = ("large", (44, 52)) if rng.random() < 0.5 else ("small", (20, 26))
        items.append(Item("shape", shape, cell.x, cell.y, rng.randint(*sizes), colour))
        parts.append(f"a {size} {colour} {shape} at the {cell.name}")
    return items, ", ".join(parts) + "."


def _sizes(rng: random.Random) -> tuple[list[Item], str]:
    first, second = rng.sample(all_objects(), 2)
    large, small = rng.randint(76, 90), rng.randint(36, 48)
    left = rng.random() < 0.5
    items = [
        _object_item(rng, first, 50 if left else 110, rng.randint(50, 110), large),
        _object_item(rng, second, 128 if left else 32, rng.randint(30, 130), small),
    ]
    return items, f"a large {first.name} and a small {second.name}."


def _text_item(rng: random.Random, text: str, y: int | None = None) -> Item:
    size = rng.randint(28, 44)
    while text_width(text, size) > SIZE - 12:
        size -= 2
    half = int(text_width(text, size) / 2) + 4
    x = rng.randint(half, SIZE - half)
    y = rng.randint(28, SIZE - 28) if y is None else y
    return Item("text", text, x, y, size, rng.choice(tuple(COLOURS)))


def _word(rng: random.Random) -> tuple[list[Item], str]:
    item = _text_item(rng, rng.choice(words()))
    return [item], f'the word "{item.name}" in {item.colour}.'


def _number(rng: random.Random) -> tuple[list[Item], str]:
    item = _text_item(rng, str(rng.randint(0, 99)))
    return [item], f"the number {item.name} in {item.colour}."


def _sum(rng: random.Random) -> tuple[list[Item], str]:
    item = _text_item(rng, f"{rng.randint(0, 9)} {rng.choice('+-')} {rng.randint(0, 9)}")
    return [item], f"the text {item.name}."


def _flag(rng: random.Random) -> tuple[list[Item], str]:
    country, size = rng.choice(tuple(FLAGS)), rng.randint(70, 130)
    low, high = size // 2, SIZE - size // 2
    item = Item("flag", country, rng.randint(low, high), rng.randint(low, high), size)
    return [item], f"the flag of {country}."


def _labelled(rng: random.Random) -> tuple[list[Item], str]:
    thing = rng.choice(all_objects())
    text = _text_item(rng, rng.choice(words()), y=132)
    items = [_object_item(rng, thing, 80, 58, rng.randint(70, 90)), text]
    return items, f'{with_article(thing.name)} and the word "{text.name}".'


_KINDS: tuple[tuple[Callable[[random.Random], tuple[list[Item], str]], int], ...] = (
    (_single, 6), (_placed, 8), (_beside, 14), (_corners, 16), (_count_objects, 12), (_count_shapes, 10),
    (_shapes, 14), (_sizes, 8), (_word, 16), (_number, 14), (_sum, 10), (_flag, 5), (_labelled, 12),
)  # fmt: skip


def captioned(rng: random.Random) -> Captioned:
    """Draw one picture's scene with its caption."""
    make = rng.choices([kind for kind, _ in _KINDS], [weight for _, weight in _KINDS])[0]
    items, caption = make(rng)
    background = rng.choice(tuple(BACKGROUNDS)) if rng.random() < 0.5 else "white"
    names = tuple(item.name for item in items if item.kind == "object")
    text = capitalised(caption)
    if rng.random() < 0.25:
        text += f" The background is {background}."
    return Captioned(Scene(tuple(items), background), text, names)
