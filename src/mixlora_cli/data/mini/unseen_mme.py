"""Counterpart of MME: two questions a picture, one answered yes and one no, in eight of MME's subtasks."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from mixlora_cli.data.mini.benchmark import Benchmark, Question
from mixlora_cli.data.mini.canvas import Item, Scene
from mixlora_cli.data.mini.layout import (
    anywhere,
    background,
    ninths,
    quarters,
    shape_colour,
    side_by_side,
    thing,
    things,
    writing,
)
from mixlora_cli.data.mini.objects import COLOURS, shapes
from mixlora_cli.data.mini.vocabulary import (
    calculations,
    capitalised,
    is_or_are,
    pictured,
    with_article,
    written_words,
)

_CLOSE = " Please answer yes or no."
TEMPLATES = {
    "existence": "{Is_} there {a} in this image?",
    "count": "Is the total number of objects in this image {n}?",
    "position": "{Is_} the {name} on the {side} side of the {other}?",
    "color": "Is there {colour} {shape} in this image?",
    "scene": "Are all objects in this image {group}?",
    "OCR": 'Is the word in this image "{word}"?',
    "commonsense_reasoning": "Can the object in this image be used to {purpose}?",
    "numerical_calculation": "Is the answer to the arithmetic question in this image {n}?",
}
GROUPS = {
    "animal": "animals",
    "food": "food",
    "vehicle": "vehicles",
    "tool": "tools",
    "clothing": "things to wear",
    "body": "parts of a body",
}
PURPOSES = {
    "umbrella": "stay dry in the rain",
    "axe": "cut down a tree",
    "toothbrush": "clean teeth",
    "bucket": "carry water",
    "camera": "take a photograph",
    "airplane": "fly to another country",
    "violin": "play a melody",
    "candle": "light a dark room",
    "door": "close a room",
    "microscope": "look at tiny cells",
}
"""Unseen object -> what it is for; no object serves another's purpose."""

Pair = tuple[Scene, dict[str, str], dict[str, str]]
"""A scene and the blanks of its two questions: that of the answer yes, that of the answer no."""


def _existence(rng: Random, k: int) -> Pair:
    *shown, absent = rng.sample(pictured("unseen"), 4)
    scene = Scene(things(shown, quarters(rng, 3)), background(rng))

    def blanks(name: str) -> dict[str, str]:
        return {"Is_": capitalised(is_or_are(name)), "a": with_article(name)}

    return scene, blanks(rng.choice(shown).name), blanks(absent.name)


def _count(rng: Random, k: int) -> Pair:
    count = k % 6 + 1
    shown = rng.sample(pictured("unseen"), count)
    if rng.random() < 0.5:
        shown = [shown[0]] * count
    wrong = rng.choice([n for n in range(1, 7) if n != count])
    return Scene(things(shown, ninths(rng, count)), background(rng)), {"n": str(count)}, {"n": str(wrong)}


def _position(rng: Random, k: int) -> Pair:
    pair = rng.sample(pictured("unseen"), 2)
    scene = Scene(things(pair, side_by_side(rng)), background(rng))
    asked = rng.randrange(2)
    verb = capitalised(is_or_are(pair[asked].name))
    shared = {"Is_": verb, "name": pair[asked].name, "other": pair[1 - asked].name}
    return scene, {**shared, "side": ("left", "right")[asked]}, {**shared, "side": ("right", "left")[asked]}


def _color(rng: Random, k: int) -> Pair:
    ground = background(rng)
    item = Item("shape", rng.choice(shapes("unseen")), *anywhere(rng), shape_colour(rng, ground))
    wrong = rng.choice([colour for colour in COLOURS if colour != item.colour])
    right, false = ({"colour": with_article(c), "shape": item.name} for c in (item.colour, wrong))
    return Scene((item,), ground), right, false


def _scene(rng: Random, k: int) -> Pair:
    group = tuple(GROUPS)[k % len(GROUPS)]
    shown = rng.sample([item for item in pictured("unseen") if item.category == group], 3)
    wrong = rng.choice([name for name in GROUPS if name != group])
    scene = Scene(things(shown, quarters(rng, 3)), background(rng))
    return scene, {"group": GROUPS[group]}, {"group": GROUPS[wrong]}


def _ocr(rng: Random, k: int) -> Pair:
    right, wrong = rng.sample(written_words("unseen"), 2)
    return Scene((writing(rng, right, (28, 42)),), background(rng)), {"word": right}, {"word": wrong}


def _commonsense(rng: Random, k: int) -> Pair:
    name = tuple(PURPOSES)[k % len(PURPOSES)]
    item = next(item for item in pictured("unseen") if item.name == name)
    wrong = rng.choice([other for other in PURPOSES if other != name])
    scene = Scene((thing(item, anywhere(rng)),), background(rng))
    return scene, {"purpose": PURPOSES[name]}, {"purpose": PURPOSES[wrong]}


def _calculation(rng: Random, k: int) -> Pair:
    text, result = rng.choice(calculations("unseen"))
    wrong = rng.choice([n for n in range(max(0, result - 3), result + 4) if n != result])
    return Scene((writing(rng, text, (30, 44)),), background(rng)), {"n": str(result)}, {"n": str(wrong)}


SUBTASKS: dict[str, Callable[[Random, int], Pair]] = {
    "existence": _existence,
    "count": _count,
    "position": _position,
    "color": _color,
    "scene": _scene,
    "OCR": _ocr,
    "commonsense_reasoning": _commonsense,
    "numerical_calculation": _calculation,
}


def _picture(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    name = tuple(SUBTASKS)[k % len(SUBTASKS)]
    scene, right, wrong = SUBTASKS[name](rng, k // len(SUBTASKS))
    template = TEMPLATES[name] + _CLOSE
    questions = [
        Question(template.format(**blanks), answer, {"category": name})
        for blanks, answer in ((right, "yes"), (wrong, "no"))
    ]
    rng.shuffle(questions)
    return scene, questions


MINI_MME = Benchmark(
    "mini_mme",
    "Answer a question about perception (objects, number, place, colour, scene, writing) or reasoning "
    "(purpose, calculation) with yes or no.",
    tuple(template + _CLOSE for template in TEMPLATES.values()),
    num_pictures=10 * len(SUBTASKS),
    picture=_picture,
    pairs=True,
)
