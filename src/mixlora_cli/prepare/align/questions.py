"""Short questions about the pictures of stage one, so that the base answers what it is asked before any adapter.

LLaVA's language model follows instructions before it sees a picture; the small one, taught to caption alone, answers
everything with a caption. The wordings here are neither those of the training tasks nor those of the benchmarks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from mixlora_cli.data.mini.canvas import SIZE, Item, Scene
from mixlora_cli.data.mini.captions import NINTHS
from mixlora_cli.data.mini.objects import (
    COLOURS,
    NUMBER_WORDS,
    all_objects,
    capitalised,
    is_or_are,
    shapes,
    with_article,
    words,
)

_APART = 30
"""Pixels between two centres from which on one counts as left of, or above, the other."""
_AT_MOST = 3
"""Questions of one kind about one picture."""
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Asked(NamedTuple):
    """A question with its short answer."""

    kind: str
    text: str
    answer: str


_Made = tuple[str, str] | None
"""A question and its answer; None where this kind does not fit the picture."""


def ask(rng: random.Random, scene: Scene, count: int) -> list[Asked]:
    """At most `count` different questions about a scene; the same draws of `rng` give the same questions."""
    asked: list[Asked] = []
    for _ in range(8 * count):
        if len(asked) == count:
            break
        kind, make, _ = rng.choices(_KINDS, [weight for _, _, weight in _KINDS])[0]
        made = make(rng, scene)
        if made is not None and _is_new(Asked(kind, *made), asked):
            asked.append(Asked(kind, *made))
    return asked


def _is_new(question: Asked, asked: list[Asked]) -> bool:
    """Whether it asks for something else: the answer of an earlier turn must not give it away."""
    alike = [other for other in asked if other.kind == question.kind]
    if len(alike) == _AT_MOST:
        return False
    if question.answer in ("yes", "no"):
        return all(other.text != question.text for other in alike)
    return all(other.answer != question.answer for other in asked)


def _of_kind(scene: Scene, *kinds: str) -> list[Item]:
    return [item for item in scene.items if item.kind in kinds]


def _once(items: list[Item]) -> list[Item]:
    """Those whose name no other one has."""
    names = [item.name for item in items]
    return [item for item in items if names.count(item.name) == 1]


def _yes_no(rng: random.Random, statement: str, true: bool) -> tuple[str, str]:
    form = rng.choice(("Yes or no: {}.", "{}, yes or no?", "Is this so? {}."))
    return form.format(capitalised(statement)), "yes" if true else "no"


def _absent(rng: random.Random, shown: list[Item]) -> str:
    """The name of an object that is not there, half the time of a shown one's category."""
    names = {item.name for item in shown}
    free = [item for item in all_objects() if item.name not in names and item.name not in shapes()]
    if rng.random() < 0.5:
        categories = {item.category for item in all_objects() if item.name in names}
        free = [item for item in free if item.category in categories] or free
    return rng.choice(free).name


def _presence(rng: random.Random, scene: Scene) -> _Made:
    shown = _of_kind(scene, "object")
    if not shown:
        return None
    there = rng.random() < 0.5
    name = rng.choice(shown).name if there else _absent(rng, shown)
    form = rng.choice(("Do you find {} in it?", "{a} here, yes or no?", "Look: {is_} {} in view?"))
    phrase = with_article(name)
    return form.format(phrase, a=capitalised(phrase), is_=is_or_are(name)), "yes" if there else "no"


def _relations(first: Item, second: Item) -> list[str]:
    """Where the first is, seen from the second."""
    found = []
    if abs(first.x - second.x) >= _APART:
        found.append("left of" if first.x < second.x else "right of")
    if abs(first.y - second.y) >= _APART:
        found.append("above" if first.y < second.y else "below")
    return found


def _related(rng: random.Random, scene: Scene) -> tuple[Item, Item, str] | None:
    items = _once(_of_kind(scene, "object"))
    if len(items) < 2:
        return None
    first, second = rng.sample(items, 2)
    relations = _relations(first, second)
    return (first, second, rng.choice(relations)) if relations else None


def _relation(rng: random.Random, scene: Scene) -> _Made:
    if (related := _related(rng, scene)) is None:
        return None
    first, second, relation = related
    true = rng.random() < 0.5
    told = relation if true else _OPPOSITES[relation]
    return _yes_no(rng, f"the {first.name} {is_or_are(first.name)} {told} the {second.name}", true)


def _which_side(rng: random.Random, scene: Scene) -> _Made:
    """Of two things, the one that is further in a direction; either order of the names."""
    if (related := _related(rng, scene)) is None:
        return None
    first, second, relation = related
    further = {"left of": "left", "right of": "right", "above": "up", "below": "down"}[relation]
    names = [first.name, second.name]
    rng.shuffle(names)
    return f"Further {further}: {names[0]} or {names[1]}?", first.name


def _next_to(rng: random.Random, scene: Scene) -> _Made:
    """Only where one other thing alone can be meant."""
    items = _once(_of_kind(scene, "object"))
    if len(items) != len(scene.items) or len(items) < 2:
        return None
    here = rng.choice(items)
    relation = rng.choice(tuple(_OPPOSITES))
    there = [item for item in items if item is not here and relation in _relations(item, here)]
    return (f"What do you find {relation} the {here.name}?", there[0].name) if len(there) == 1 else None


def _place_of(item: Item) -> str:
    """One of nine places: `top left`, `right`, `middle`, ..."""
    row, column = (min(3 * centre // SIZE, 2) for centre in (item.y, item.x))
    return NINTHS[3 * row + column].name


def _at_place(rng: random.Random, scene: Scene) -> _Made:
    items = _of_kind(scene, "object", "shape")
    if not items:
        return None
    item = rng.choice(items)
    place = _place_of(item)
    alone = sum(_place_of(other) == place for other in items) == 1
    return (f"Look at the {place}. What is it?", item.name) if alone else None


def _naming(rng: random.Random, scene: Scene) -> _Made:
    names = {item.name for item in _of_kind(scene, "object")}
    if len(names) != 1:
        return None
    return rng.choice(("What thing is it?", "Say its name.", "What would you call it?")), names.pop()


def _from_list(rng: random.Random, scene: Scene) -> _Made:
    shown = _of_kind(scene, "object")
    if not shown:
        return None
    right = rng.choice(shown).name
    options = list(dict.fromkeys([right, *(_absent(rng, shown) for _ in range(rng.randint(1, 5)))]))
    rng.shuffle(options)
    return f"Choose from {', '.join(options)}: which one is here?", right


def _colour(rng: random.Random, scene: Scene) -> _Made:
    items = [*_once(_of_kind(scene, "shape")), *_of_kind(scene, "text")]
    if not items:
        return None
    item = rng.choice(items)
    what = item.name if item.kind == "shape" else "text"
    if rng.random() < 0.5:
        return f"In what colour do you see the {what}?", item.colour
    true = rng.random() < 0.5
    told = item.colour if true else rng.choice([colour for colour in COLOURS if colour != item.colour])
    return _yes_no(rng, f"the {what} is {told}", true)


def _form(rng: random.Random, scene: Scene) -> _Made:
    found = {item.name for item in _of_kind(scene, "shape")}
    if len(found) != 1:
        return None
    shape = found.pop()
    if rng.random() < 0.5:
        return "Say which form you see.", shape
    true = rng.random() < 0.5
    told = shape if true else rng.choice([name for name in shapes() if name != shape])
    return _yes_no(rng, f"the form is {with_article(told)}", true)


def _number(rng: random.Random, scene: Scene) -> _Made:
    if _of_kind(scene, "text"):
        return None
    count = len(scene.items)
    if rng.random() < 0.5:
        return "How many, all in all?", NUMBER_WORDS[count]
    true = rng.random() < 0.5
    told = count if true else rng.choice([n for n in range(1, 7) if n != count])
    return _yes_no(rng, f"the number of things is {told if rng.random() < 0.5 else NUMBER_WORDS[told]}", true)


def _reading(rng: random.Random, scene: Scene) -> _Made:
    written = _of_kind(scene, "text")
    if not written:
        return None
    text = written[0].name
    if rng.random() < 0.6:
        return rng.choice(("Spell out the text.", "Copy what stands there.")), text
    true = rng.random() < 0.5
    others = [word for word in words() if word != text]
    wrong = rng.choice(others) if text.isalpha() else str(rng.randint(0, 99))
    return None if wrong == text else _yes_no(rng, f'it reads "{text if true else wrong}"', true)


def _flag(rng: random.Random, scene: Scene) -> _Made:
    flags = _of_kind(scene, "flag")
    return ("Which nation is meant?", flags[0].name) if flags else None


_KINDS: tuple[tuple[str, Callable[[random.Random, Scene], _Made], int], ...] = (
    ("presence", _presence, 8), ("relation", _relation, 6), ("which side", _which_side, 3),
    ("next to", _next_to, 5), ("at place", _at_place, 4), ("naming", _naming, 3), ("from list", _from_list, 3),
    ("colour", _colour, 5), ("form", _form, 4), ("number", _number, 4), ("reading", _reading, 10), ("flag", _flag, 8),
)  # fmt: skip
"""(kind, what makes a question of it, weight); where a kind does not fit the picture another one is drawn."""
