"""What the small pictures show: objects by category, words, shapes, colours and flags, each split into seen and unseen.

An object is a code point of the OpenMoji colour font; its name is the one of the Unicode standard, so that the table
holds code points alone. Training tasks draw from `split="seen"`, evaluation benchmarks from `split="unseen"`; the
caption stage (stage one) sees both, in pictures of its own.

Names are kept apart where the tables overlap: a seen object is not called like an unseen shape, a word that
is read in training is not the name of an unseen object, and the other way round.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from mixlora_cli.errors import UserError

Split = Literal["seen", "unseen"]

# Glyphs that look alike at 40 pixels (ox and cow, ram and goat, hotel and bank) are left out on purpose.
_CODE_POINTS: dict[str, str] = {
    "animal": """1f401 1f404 1f405 1f406 1f407 1f408 1f409 1f40a 1f40b 1f40c 1f40d 1f40e 1f410 1f411 1f412 1f414
        1f415 1f416 1f418 1f419 1f41c 1f41f 1f422 1f426 1f427 1f42c 1f577 1f980 1f985 1f986 1f987 1f988
        1f989 1f98b 1f98c 1f98d 1f98e 1f990 1f991 1f998 1f99c 1f99e 1f9ab 1f9ad""",
    "food": """1f330 1f344 1f345 1f347 1f349 1f34b 1f34c 1f34d 1f350 1f351 1f352 1f353 1f35e 1f363 1f36a 1f36c
        1f37f 1f951 1f952 1f953 1f954 1f955 1f95a 1f95c 1f95e 1f965 1f966 1f967 1f96a 1f96d 1f9c4 1f9c5
        1f9c8 1fad0 1fad2 1fad8""",
    "vehicle": "1f680 1f681 1f686 1f68a 1f68c 1f691 1f695 1f697 1f69c 1f6a2 1f6b2 1f6f6 1f6f7 26f4 2708 1f6f0 1fa82",
    "tool": "1f527 1f528 1fa93 1fa9c 1fa9d 1faa3 1f9f9 1fa92 1faa5 270f 2699 1f9f2 1f9ed 1f9fd 1f52c 1f52d",
    "clothing": "1f451 1f456 1f457 1f9e4 1f9e5 1f9e6 1fa73 1f97d 1f45b 1f48d 1f380 2602",
    "building": "1f3ed 1f3eb 1f54c 26ea 1f6d6 26fa 1f3df 26f2 1f3e5",
    "music": "1f3b8 1f3ba 1f3bb 1f3a4 1f514 1f4fb 1f508",
    "furniture": "1fa91 1f6cf 1f6aa 1f6bd 1f6c1 1f6bf 1fa9e 1fa9f 1f56f 1f6d7",
    "thing": """1f944 1fad9 1f9fa 1f511 1f512 1f4f7 1f4fa 1f4da 1f5a8 1f50b 1f388 1f3ab 1f4e6 1f4c5 1f4f0 2709 1f4dc
        1f489 1f48a 1f321 1f3c6 1fa99 1fa81 1f4a3 1f6e1 2693 1f3f7 1f9fe""",
    "nature": """1f305 1f308 1f30b 1f335 1f339 1f33b 1f33c 1f331 1f33f 1fab6 1faa8 1fab8 1fab7 1fab5 2601 2604 26f0
        1f525 1f4a7""",
    "body": "1f441 1f442 1f443 1f444 1f445 1f9b5 1f9b6 1f9b7 1f9b4 1f9e0 1fac1 1f480",
}

_WORDS = """
    book tree house water night light music paper stone bread river table glass plant smile dream heart sugar
    money world green black white ocean queen sword cloud storm earth beach field horse mouse honey lemon tiger
    apple bridge winter summer garden market doctor flower silver golden island forest dinner family friend travel
    school orange yellow purple circle square number letter word door fish milk coffee train
"""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "blue": (38, 84, 200),
    "green": (42, 150, 62),
    "yellow": (246, 205, 36),
    "orange": (240, 130, 30),
    "purple": (132, 60, 170),
    "pink": (244, 130, 180),
    "brown": (122, 76, 38),
    "black": (25, 25, 25),
    "gray": (128, 128, 128),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "blue": (196, 216, 250),
    "green": (200, 238, 200),
    "yellow": (252, 244, 196),
    "pink": (252, 216, 228),
    "gray": (214, 214, 214),
}

SHAPES: dict[str, Split] = {
    "circle": "seen",
    "square": "seen",
    "triangle": "seen",
    "star": "seen",
    "cross": "seen",
    "heart": "unseen",
    "diamond": "unseen",
    "ring": "unseen",
}

# name -> (direction of the stripes, colours in order); "disc" is a disc on a field.
FLAGS: dict[str, tuple[Literal["vertical", "horizontal", "disc"], tuple[str, ...]]] = {
    "France": ("vertical", ("blue", "white", "red")),
    "Italy": ("vertical", ("green", "white", "red")),
    "Belgium": ("vertical", ("black", "yellow", "red")),
    "Ireland": ("vertical", ("green", "white", "orange")),
    "Nigeria": ("vertical", ("green", "white", "green")),
    "Peru": ("vertical", ("red", "white", "red")),
    "Germany": ("horizontal", ("black", "red", "yellow")),
    "Russia": ("horizontal", ("white", "blue", "red")),
    "Hungary": ("horizontal", ("red", "white", "green")),
    "Austria": ("horizontal", ("red", "white", "red")),
    "Poland": ("horizontal", ("white", "red")),
    "Ukraine": ("horizontal", ("blue", "yellow")),
    "Japan": ("disc", ("white", "red")),
    "Bangladesh": ("disc", ("green", "red")),
}


_PLURAL = {
    *("grapes", "cherries", "pancakes", "blueberries", "peanuts", "beans"),
    *("jeans", "gloves", "shorts", "goggles", "socks", "books", "lungs"),
}
_UNCOUNTED = {
    *("bread", "sushi", "candy", "popcorn", "bacon", "garlic", "broccoli", "butter"),
    *("wood", "coral", "fire"),
}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class MiniObject:
    """One drawable object."""

    code_point: int
    name: str
    category: str
    split: Split


def _split(position: int) -> Split:
    """Every third entry of a list is unseen."""
    return "unseen" if position % 3 == 2 else "seen"


@lru_cache(maxsize=1)
def all_objects() -> tuple[MiniObject, ...]:
    """Every object, in the order of the table."""
    return tuple(
        MiniObject(int(code, 16), unicodedata.name(chr(int(code, 16))).lower(), category, _split(position))
        for category, codes in _CODE_POINTS.items()
        for position, code in enumerate(codes.split())
    )


def objects(split: Split) -> tuple[MiniObject, ...]:
    """The objects of one split."""
    return tuple(item for item in all_objects() if item.split == split)


def words(split: Split | None = None) -> tuple[str, ...]:
    """The words that pictures may show in writing; `None` = both splits."""
    return tuple(
        word for position, word in enumerate(_WORDS.split()) if split is None or _split(position) == split
    )


def shapes(split: Split | None = None) -> tuple[str, ...]:
    """The names of the drawn shapes; `None` = both splits."""
    return tuple(name for name, part in SHAPES.items() if split is None or part == split)


@lru_cache(maxsize=2)
def pictured(split: Split) -> tuple[MiniObject, ...]:
    """The objects of a split that tasks draw from."""
    return tuple(item for item in objects(split) if item.name not in SHAPES)


@lru_cache(maxsize=2)
def written_words(split: Split) -> tuple[str, ...]:
    """The words of a split that pictures show in writing, none of them the name of another split's object."""
    other: Split = "unseen" if split == "seen" else "seen"
    foreign = {item.name for item in objects(other)} | set(SHAPES)
    return tuple(word for word in words(split) if word not in foreign)


@lru_cache(maxsize=2)
def two_digit_numbers(split: Split) -> tuple[int, ...]:
    """10 to 99; every third is unseen."""
    return tuple(n for n in range(10, 100) if (n % 3 == 2) == (split == "unseen"))


@lru_cache(maxsize=2)
def calculations(split: Split) -> tuple[tuple[str, int], ...]:
    """Additions and subtractions of 1 to 9 with their results, 0 to 18; about a third is unseen."""
    found = []
    for a in range(1, 10):
        for b in range(1, 10):
            if ((a + 2 * b + a // 3) % 3 == 2) == (split == "unseen"):
                found.append((f"{a} + {b}", a + b))
                if a >= b:
                    found.append((f"{a} - {b}", a - b))
    return tuple(found)


def with_article(name: str) -> str:
    """`a rabbit`, `an egg`, `grapes`, `bread`."""
    if name in _PLURAL or name in _UNCOUNTED:
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def is_or_are(name: str) -> str:
    """The verb that goes with a thing's name."""
    return "are" if name in _PLURAL else "is"


def capitalised(text: str) -> str:
    """The text with its first letter in upper case, the others as they are."""
    return text[:1].upper() + text[1:]


def definition_of(draw: Callable[..., Any]) -> str:
    """The function's docstring on one line.

    Raises:
        UserError: Python was told to leave docstrings out (-OO).
    """
    if draw.__doc__ is None:
        raise UserError(
            "python -OO leaves out the texts that define the built-in tasks; start it without -OO"
        )
    return " ".join(draw.__doc__.split())
