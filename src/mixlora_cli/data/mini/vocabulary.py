"""What tasks may show, by split, and how a thing is called in a sentence.

Names are kept apart where the tables overlap: a seen object is not called like an unseen shape, a word that
is read in training is not the name of an unseen object, and the other way round.
"""

from __future__ import annotations

from functools import lru_cache

from mixlora_cli.data.mini.objects import SHAPES, MiniObject, Split, objects, words

_PLURAL = {
    *("grapes", "cherries", "pancakes", "blueberries", "peanuts", "beans"),
    *("jeans", "gloves", "shorts", "goggles", "socks", "books", "lungs"),
}
_UNCOUNTED = {
    *("bread", "sushi", "candy", "popcorn", "bacon", "garlic", "broccoli", "butter"),
    *("wood", "coral", "fire"),
}


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
