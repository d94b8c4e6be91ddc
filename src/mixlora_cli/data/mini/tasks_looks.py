"""Seen tasks about colours, shapes and flags."""

from __future__ import annotations

from random import Random

from mixlora_cli.data.mini.canvas import Item, Scene
from mixlora_cli.data.mini.layout import anywhere, background, shape_colour, thing
from mixlora_cli.data.mini.objects import BACKGROUNDS, FLAGS, shapes
from mixlora_cli.data.mini.task import Draw, Task
from mixlora_cli.data.mini.vocabulary import pictured


def _one_shape(rng: Random) -> tuple[Scene, Item]:
    ground = background(rng)
    item = Item("shape", rng.choice(shapes("seen")), *anywhere(rng), shape_colour(rng, ground))
    return Scene((item,), ground), item


def _colour(rng: Random) -> Draw:
    scene, item = _one_shape(rng)
    return Draw(scene, item.colour)


def _shape(rng: Random) -> Draw:
    scene, item = _one_shape(rng)
    return Draw(scene, item.name)


def _ground(rng: Random) -> Draw:
    ground = rng.choice(tuple(BACKGROUNDS))
    return Draw(Scene((thing(rng.choice(pictured("seen")), anywhere(rng)),), ground), ground)


def _flag(rng: Random) -> Draw:
    country = rng.choice(tuple(FLAGS))
    spot = anywhere(rng, 80, 130)
    return Draw(Scene((Item("flag", country, *spot),), background(rng)), country)


LOOKS_TASKS = (
    Task(
        "shape_colour",
        "Name the colour of the shape in the picture, not its form and not the background's colour.",
        (
            "What colour is the shape?",
            "Name the colour of the figure.",
            "Which colour was used for the shape?",
        ),
        _colour,
    ),
    Task(
        "shape_naming",
        "Name the geometric shape in the picture, not its colour: " + ", ".join(shapes("seen")) + ".",
        ("What shape is it?", "Name the form of the figure.", "Which shape was drawn?"),
        _shape,
    ),
    Task(
        "background_colour",
        "Name the colour of the background behind the object: " + ", ".join(BACKGROUNDS) + ".",
        (
            "What colour is the background?",
            "Name the colour behind the object.",
            "On which colour is the object placed?",
        ),
        _ground,
    ),
    Task(
        "flag_naming",
        "Name the country whose flag the picture shows.",
        ("Which country has this flag?", "Name the country of the flag.", "Whose flag is it?"),
        _flag,
    ),
)
