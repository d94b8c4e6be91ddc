"""Seen tasks about where things are and how large."""

from __future__ import annotations

from random import Random

from mixlora_cli.data.mini.canvas import Scene
from mixlora_cli.data.mini.layout import (
    PLACES,
    background,
    one_above_other,
    place,
    row_of_three,
    side_by_side,
    small_and_large,
    things,
)
from mixlora_cli.data.mini.objects import MiniObject
from mixlora_cli.data.mini.task import Draw, Task
from mixlora_cli.data.mini.tasks_objects import some_objects
from mixlora_cli.data.mini.vocabulary import capitalised, is_or_are


def _asking(subject: MiniObject, other: MiniObject) -> dict[str, str]:
    verb = is_or_are(subject.name)
    return {"name": subject.name, "other": other.name, "is_": verb, "Is_": capitalised(verb)}


def _left_or_right(rng: Random) -> Draw:
    pair = some_objects(rng, 2)
    scene = Scene(things(pair, side_by_side(rng)), background(rng))
    k = rng.randrange(2)
    return Draw(scene, ("left", "right")[k], _asking(pair[k], pair[1 - k]))


def _above_or_below(rng: Random) -> Draw:
    pair = some_objects(rng, 2)
    scene = Scene(things(pair, one_above_other(rng)), background(rng))
    k = rng.randrange(2)
    return Draw(scene, ("above", "below")[k], _asking(pair[k], pair[1 - k]))


def _neighbour(rng: Random) -> Draw:
    left, middle, right = some_objects(rng, 3)
    scene = Scene(things([left, middle, right], row_of_three(rng)), background(rng))
    side, answer = rng.choice([("left", left), ("right", right)])
    return Draw(scene, answer.name, {"side": side, "name": middle.name})


def _position(rng: Random) -> Draw:
    pair = some_objects(rng, 2)
    where = rng.sample(PLACES, 2)
    scene = Scene(things(pair, [place(rng, name) for name in where]), background(rng))
    return Draw(scene, where[0], _asking(pair[0], pair[1]))


def _size(rng: Random) -> Draw:
    pair = some_objects(rng, 2)
    scene = Scene(things(pair, small_and_large(rng)), background(rng))
    k = rng.randrange(2)
    first, second = rng.sample(pair, 2)  # the order of the names must not give the answer away
    blanks = {"size": ("smaller", "larger")[k], "name": first.name, "other": second.name}
    return Draw(scene, pair[k].name, blanks)


SPACE_TASKS = (
    Task(
        "left_or_right",
        "Say on which side of the second object the first object stands. Answer left or right.",
        (
            "{Is_} the {name} left or right of the {other}?",
            "Left or right of the {other}: where {is_} the {name}?",
            "Seen from the {other}, {is_} the {name} left or right?",
        ),
        _left_or_right,
    ),
    Task(
        "above_or_below",
        "Say whether the first object is above the second in the picture. Answer above or below.",
        (
            "{Is_} the {name} above or below the {other}?",
            "Above or below the {other}: where {is_} the {name}?",
            "Seen from the {other}, {is_} the {name} above or below?",
        ),
        _above_or_below,
    ),
    Task(
        "neighbour_naming",
        "Three objects stand in a row. Name the one next to the given object on the given side.",
        (
            "What is directly {side} of the {name}?",
            "Name the neighbour to the {side} of the {name}.",
            "Which object stands just {side} of the {name}?",
        ),
        _neighbour,
    ),
    Task(
        "picture_position",
        "Say in which part of the picture an object is: " + ", ".join(PLACES) + ".",
        (
            "Where {is_} the {name}?",
            "Give the position of the {name}.",
            "In which part of the picture {is_} the {name}?",
        ),
        _position,
    ),
    Task(
        "size_comparison",
        "Two objects are drawn at different sizes. Name the one that is drawn larger, or smaller, as asked.",
        (
            "Which is {size}, the {name} or the {other}?",
            "Compare sizes: which is {size}, {name} or {other}?",
            "Of {name} and {other}, name the {size} one.",
        ),
        _size,
    ),
)
