"""Seen tasks about whole captions: writing one, and judging whether one fits.

A caption has one of four forms: an object on its background, two objects and their relation (the left or
upper one first), a coloured shape and an object beside it, or a written word.
"""

from __future__ import annotations

from random import Random

from mixlora_cli.data.mini.canvas import Item, Scene
from mixlora_cli.data.mini.layout import (
    anywhere,
    background,
    one_above_other,
    shape_colour,
    side_by_side,
    thing,
    things,
    writing,
)
from mixlora_cli.data.mini.objects import BACKGROUNDS, COLOURS, shapes
from mixlora_cli.data.mini.task import Draw, Task
from mixlora_cli.data.mini.tasks_objects import similar_object, some_objects
from mixlora_cli.data.mini.vocabulary import pictured, with_article, written_words

Captioned = tuple[Scene, str, str]
"""A scene, its caption, and a caption of the same form that is wrong in one place."""


def _other(rng: Random, right: str, names: tuple[str, ...]) -> str:
    return rng.choice([name for name in names if name != right])


def _object_on_ground(rng: Random) -> Captioned:
    item, ground = rng.choice(pictured("seen")), background(rng)
    wrong_name, wrong_ground = item.name, ground
    if rng.random() < 0.5:
        wrong_name = similar_object(rng, [item]).name
    else:
        wrong_ground = _other(rng, ground, tuple(BACKGROUNDS))
    form = "{} on {}"
    scene = Scene((thing(item, anywhere(rng)),), ground)
    return (
        scene,
        form.format(with_article(item.name), ground),
        form.format(with_article(wrong_name), wrong_ground),
    )


def _two_objects(rng: Random) -> Captioned:
    pair = some_objects(rng, 2)
    beside = rng.random() < 0.5
    relation = "left of" if beside else "above"
    spots = side_by_side(rng) if beside else one_above_other(rng)
    first, second = (with_article(item.name) for item in pair)
    scene = Scene(things(pair, spots), background(rng))
    other = with_article(similar_object(rng, pair).name)
    wrong = rng.choice([(second, first), (other, second), (first, other)])
    return scene, f"{first} {relation} {second}", f"{wrong[0]} {relation} {wrong[1]}"


def _shape_and_object(rng: Random) -> Captioned:
    ground, item = background(rng), rng.choice(pictured("seen"))
    colour, shape = shape_colour(rng, ground), rng.choice(shapes("seen"))
    left, right = side_by_side(rng)
    scene = Scene((Item("shape", shape, *left, colour), thing(item, right)), ground)
    wrong_colour, wrong_shape = colour, shape
    if rng.random() < 0.5:
        wrong_colour = _other(rng, colour, tuple(COLOURS))
    else:
        wrong_shape = _other(rng, shape, shapes("seen"))
    right_half = f"left of {with_article(item.name)}"
    return (
        scene,
        f"{with_article(colour)} {shape} {right_half}",
        f"{with_article(wrong_colour)} {wrong_shape} {right_half}",
    )


def _word(rng: Random) -> Captioned:
    word = rng.choice(written_words("seen"))
    scene = Scene((writing(rng, word, (28, 42)),), background(rng))
    return scene, f"the word {word}", f"the word {_other(rng, word, written_words('seen'))}"


_FORMS = (_object_on_ground, _two_objects, _shape_and_object, _word)


def _caption(rng: Random) -> Draw:
    scene, caption, _ = rng.choice(_FORMS)(rng)
    return Draw(scene, caption)


def _match(rng: Random) -> Draw:
    scene, right, wrong = rng.choice(_FORMS)(rng)
    fits = rng.random() < 0.5
    return Draw(scene, "yes" if fits else "no", {"caption": right if fits else wrong})


CAPTION_TASKS = (
    Task(
        "captioning",
        "Describe the picture in a few words: what it shows, with its colour, its background or its place "
        "beside another thing.",
        ("Describe the picture briefly.", "Write a short caption.", "Say in a few words what is shown."),
        _caption,
    ),
    Task(
        "caption_matching",
        "Decide whether a caption describes the picture rightly in all its parts. Answer yes or no.",
        ('Does "{caption}" fit the picture?', "Caption: {caption}. Is it right?", "Does it show {caption}?"),
        _match,
    ),
)
