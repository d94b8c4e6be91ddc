"""The unseen benchmarks, counterparts of the paper's columns: how picture number k and its questions are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from mixlora_cli.data.mini.canvas import SIZE, Item, Scene
from mixlora_cli.data.mini.layout import (
    anywhere,
    background,
    colour_on,
    ninths,
    quarters,
    side_by_side,
    thing,
    things,
    writing,
)
from mixlora_cli.data.mini.objects import (
    COLOURS,
    MiniObject,
    calculations,
    capitalised,
    definition_of,
    is_or_are,
    pictured,
    shapes,
    two_digit_numbers,
    with_article,
    written_words,
)
from mixlora_cli.data.mini.seen import CATEGORIES, category_word


@dataclass(frozen=True)
class Question:
    """One question about a picture."""

    text: str
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the record that scoring reads: `category`, `answers`, `labels`."""


_Draw = Callable[[Random, int], tuple[Scene, list[Question]]]


@dataclass(frozen=True)
class Benchmark:
    """One unseen benchmark, the counterpart of a column of the paper's tables."""

    name: str
    definition: str
    templates: tuple[str, ...]
    """Every question is one of these with its `{blanks}` filled."""
    num_pictures: int
    picture: _Draw
    """(random numbers, k) -> picture number k and its questions; k balances labels and categories."""
    pairs: bool = False
    """Whether a picture has several questions that are scored together: records then carry `image_id`."""


def benchmark(*templates: str, num_pictures: int, pairs: bool = False) -> Callable[[_Draw], Benchmark]:
    """Make a benchmark of the function that draws its pictures: of its name, and of its docstring as the definition."""

    def made(draw: _Draw) -> Benchmark:
        return Benchmark(draw.__name__, definition_of(draw), templates, num_pictures, draw, pairs)

    return made


# MME: two questions a picture, one answered yes and one no, in eight of MME's subtasks.

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

_Pair = tuple[Scene, dict[str, str], dict[str, str]]
"""A scene and the blanks of its two questions: that of the answer yes, that of the answer no."""


def _there(name: str) -> dict[str, str]:
    return {"Is_": capitalised(is_or_are(name)), "a": with_article(name)}


def _existence(rng: Random, k: int) -> _Pair:
    *shown, absent = rng.sample(pictured("unseen"), 4)
    scene = Scene(things(shown, quarters(rng, 3)), background(rng))
    return scene, _there(rng.choice(shown).name), _there(absent.name)


def _count(rng: Random, k: int) -> _Pair:
    count = k % 6 + 1
    shown = rng.sample(pictured("unseen"), count)
    if rng.random() < 0.5:
        shown = [shown[0]] * count
    wrong = rng.choice([n for n in range(1, 7) if n != count])
    return Scene(things(shown, ninths(rng, count)), background(rng)), {"n": str(count)}, {"n": str(wrong)}


def _position(rng: Random, k: int) -> _Pair:
    pair = rng.sample(pictured("unseen"), 2)
    scene = Scene(things(pair, side_by_side(rng)), background(rng))
    asked = rng.randrange(2)
    verb = capitalised(is_or_are(pair[asked].name))
    shared = {"Is_": verb, "name": pair[asked].name, "other": pair[1 - asked].name}
    return scene, {**shared, "side": ("left", "right")[asked]}, {**shared, "side": ("right", "left")[asked]}


def _color(rng: Random, k: int) -> _Pair:
    ground = background(rng)
    item = Item("shape", rng.choice(shapes("unseen")), *anywhere(rng), colour_on(rng, ground))
    wrong = rng.choice([colour for colour in COLOURS if colour != item.colour])
    right, false = ({"colour": with_article(c), "shape": item.name} for c in (item.colour, wrong))
    return Scene((item,), ground), right, false


def _scene(rng: Random, k: int) -> _Pair:
    group = tuple(GROUPS)[k % len(GROUPS)]
    shown = rng.sample([item for item in pictured("unseen") if item.category == group], 3)
    wrong = rng.choice([name for name in GROUPS if name != group])
    scene = Scene(things(shown, quarters(rng, 3)), background(rng))
    return scene, {"group": GROUPS[group]}, {"group": GROUPS[wrong]}


def _ocr(rng: Random, k: int) -> _Pair:
    right, wrong = rng.sample(written_words("unseen"), 2)
    return Scene((writing(rng, right, (28, 42)),), background(rng)), {"word": right}, {"word": wrong}


def _commonsense(rng: Random, k: int) -> _Pair:
    name = tuple(PURPOSES)[k % len(PURPOSES)]
    wrong = rng.choice([other for other in PURPOSES if other != name])
    return _alone(rng, _called(name)), {"purpose": PURPOSES[name]}, {"purpose": PURPOSES[wrong]}


def _calculation(rng: Random, k: int) -> _Pair:
    text, result = rng.choice(calculations("unseen"))
    wrong = rng.choice([n for n in range(max(0, result - 3), result + 4) if n != result])
    return Scene((writing(rng, text, (30, 44)),), background(rng)), {"n": str(result)}, {"n": str(wrong)}


SUBTASKS: dict[str, tuple[str, Callable[[Random, int], _Pair]]] = {
    "existence": ("{Is_} there {a} in this image?", _existence),
    "count": ("Is the total number of objects in this image {n}?", _count),
    "position": ("{Is_} the {name} on the {side} side of the {other}?", _position),
    "color": ("Is there {colour} {shape} in this image?", _color),
    "scene": ("Are all objects in this image {group}?", _scene),
    "OCR": ('Is the word in this image "{word}"?', _ocr),
    "commonsense_reasoning": ("Can the object in this image be used to {purpose}?", _commonsense),
    "numerical_calculation": ("Is the answer to the arithmetic question in this image {n}?", _calculation),
}
_CLOSE = " Please answer yes or no."


@benchmark(
    *(template + _CLOSE for template, _ in SUBTASKS.values()), num_pictures=10 * len(SUBTASKS), pairs=True
)
def mini_mme(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Answer a question about perception (objects, number, place, colour, scene, writing) or reasoning (purpose,
    calculation) with yes or no.
    """
    name = tuple(SUBTASKS)[k % len(SUBTASKS)]
    template, draw = SUBTASKS[name]
    scene, right, wrong = draw(rng, k // len(SUBTASKS))
    questions = [
        Question((template + _CLOSE).format(**blanks), answer, {"category": name})
        for blanks, answer in ((right, "yes"), (wrong, "no"))
    ]
    rng.shuffle(questions)
    return scene, questions


# Text-VQA, CIFAR-10, CIFAR-100 and MNIST: read a number, say a category, say a number of things.

_PRINTED_QUESTION = "Name the printed number."
_OFFERED_QUESTION = "{First} or {second}: which category fits?"
_SHARED_QUESTION = "Which category do these objects share?"
_NUMBER_QUESTION = "Give the number of things as a digit."
_ANNOTATORS = 10


def _called(name: str) -> MiniObject:
    return next(item for item in pictured("unseen") if item.name == name)


def _alone(rng: Random, item: MiniObject) -> Scene:
    return Scene((thing(item, anywhere(rng)),), background(rng))


def _members(category: str) -> list[MiniObject]:
    return [item for item in pictured("unseen") if item.category == category]


@benchmark(_PRINTED_QUESTION, num_pictures=180)
def mini_textvqa(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Read the two-digit number in a picture that also shows an object. The answer is the number in digits."""
    # the number in one half of the picture and the object in the other
    half = rng.choice([(0, 0, SIZE, SIZE // 2), (0, SIZE // 2, SIZE, SIZE)])
    written = writing(rng, str(rng.choice(two_digit_numbers("unseen"))), (48, 66), half)
    spot = quarters(rng, 1)[0]
    free_y = spot.y % (SIZE // 2) + (SIZE // 2 if written.y < SIZE // 2 else 0)
    item = thing(rng.choice(pictured("unseen")), spot._replace(y=free_y))
    question = Question(_PRINTED_QUESTION, written.name, {"answers": [written.name] * _ANNOTATORS})
    return Scene((written, item), background(rng)), [question]


@benchmark(_OFFERED_QUESTION, num_pictures=117)
def mini_cifar10(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Choose which of two categories, which the question names, the object in the picture belongs to."""
    right = CATEGORIES[k % len(CATEGORIES)]
    wrong = rng.choice([category for category in CATEGORIES if category != right])
    offered = [category_word(category) for category in (right, wrong)]
    first, second = rng.sample(offered, 2)
    text = _OFFERED_QUESTION.format(First=capitalised(first), second=second)
    return _alone(rng, rng.choice(_members(right))), [Question(text, offered[0], {"labels": offered})]


@benchmark(_SHARED_QUESTION, num_pictures=117)
def mini_cifar100(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Say which category all objects in the picture belong to; the question lists none."""
    category = CATEGORIES[k % len(CATEGORIES)]
    shown = rng.sample(_members(category), rng.randint(2, 3))
    scene = Scene(things(shown, quarters(rng, len(shown))), background(rng))
    labels = [category_word(each) for each in CATEGORIES]
    return scene, [Question(_SHARED_QUESTION, category_word(category), {"labels": labels})]


@benchmark(_NUMBER_QUESTION, num_pictures=180)
def mini_mnist(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Say with one digit how many things the picture shows, shapes and objects together."""
    count, ground = k % 6 + 1, background(rng)
    spots = ninths(rng, count)
    num_shapes = rng.randint(0, count)
    drawn = [
        Item("shape", rng.choice(shapes("unseen")), *s, colour_on(rng, ground)) for s in spots[:num_shapes]
    ]
    drawn += [thing(rng.choice(pictured("unseen")), spot) for spot in spots[num_shapes:]]
    labels = [str(n) for n in range(1, 7)]
    return Scene(tuple(drawn), ground), [Question(_NUMBER_QUESTION, str(count), {"labels": labels})]


# VSR, SNLI-VE and POPE: judge a place, a hypothesis, the presence of what is named.

POPULAR = ("cat", "horse", "tomato", "train", "umbrella", "door", "camera", "cloud")
"""The objects that POPE's pictures show most often; absent ones are asked for in its category "popular"."""
_VSR_QUESTION = "Compared with the {other}, {is_} the {name} above or below?"
_ENTAILMENT_QUESTION = 'The picture is the premise. Hypothesis: "{hypothesis}" True or false?'
_POPE_QUESTION = "{Is_} there {a} in the image?"
_KINDS_OF = {
    "animal": "an animal",
    "food": "food",
    "vehicle": "a vehicle",
    "tool": "a tool",
    "clothing": "clothing",
    "body": "a body part",
}
"""Category -> how a hypothesis names something of it."""


@benchmark(_VSR_QUESTION, num_pictures=120)
def mini_vsr(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Decide whether one of three objects is above or below another one. Answer above or below."""
    shown, spots = rng.sample(pictured("unseen"), 3), quarters(rng, 3)
    # three of four quarters: at least one is in each row
    upper = [n for n, spot in enumerate(spots) if spot.y < SIZE // 2]
    one, other = rng.choice(upper), rng.choice([n for n in range(3) if n not in upper])
    if k % 2:
        one, other = other, one
    text = _VSR_QUESTION.format(is_=is_or_are(shown[one].name), name=shown[one].name, other=shown[other].name)
    scene = Scene(things(shown, spots), background(rng))
    return scene, [Question(text, ("above", "below")[k % 2], {"labels": ["above", "below"]})]


@benchmark(_ENTAILMENT_QUESTION, num_pictures=120)
def mini_snli_ve(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Decide whether the picture entails a hypothesis or contradicts it: about an object, about two, or about a
    category. Answer true or false.
    """
    shown = rng.sample([item for item in pictured("unseen") if item.category in _KINDS_OF], 2)
    hypothesis = _HYPOTHESES[k // 2 % len(_HYPOTHESES)](rng, shown, k % 2 == 0)
    text = _ENTAILMENT_QUESTION.format(hypothesis=hypothesis)
    scene = Scene(things(shown, quarters(rng, 2)), background(rng))
    return scene, [Question(text, ("true", "false")[k % 2], {"labels": ["true", "false"]})]


def _another(rng: Random, shown: list[MiniObject]) -> MiniObject:
    """An unseen object that is not shown, half the time of the category of a shown one."""
    free = [item for item in pictured("unseen") if item not in shown]
    if rng.random() < 0.5:
        category = rng.choice(shown).category
        free = [item for item in free if item.category == category] or free
    return rng.choice(free)


def _one_is_there(rng: Random, shown: list[MiniObject], true: bool) -> str:
    name = (rng.choice(shown) if true else _another(rng, shown)).name
    return f"There {is_or_are(name)} {with_article(name)}."


def _a_kind_is_there(rng: Random, shown: list[MiniObject], true: bool) -> str:
    there = [item.category for item in shown]
    category = rng.choice(there if true else [each for each in _KINDS_OF if each not in there])
    return f"There is {_KINDS_OF[category]}."


def _two_are_there(rng: Random, shown: list[MiniObject], true: bool) -> str:
    pair = list(shown) if true else [rng.choice(shown), _another(rng, shown)]
    rng.shuffle(pair)
    first, second = (with_article(item.name) for item in pair)
    return f"{capitalised(first)} and {second} can be seen."


_HYPOTHESES = (_one_is_there, _a_kind_is_there, _two_are_there)


@benchmark(_POPE_QUESTION, num_pictures=60, pairs=True)
def mini_pope(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Decide whether an object is in the picture. Objects that are not are chosen at random, among the frequent ones,
    or among those like what is shown.
    """
    # three objects, at least one of them popular, and for each category one present and one absent
    frequent = rng.choice([item for item in pictured("unseen") if item.name in POPULAR])
    shown = [frequent, *rng.sample([item for item in pictured("unseen") if item != frequent], 2)]
    rng.shuffle(shown)
    questions: list[Question] = []
    asked: list[MiniObject] = []
    for present, category in zip(shown, ("adversarial", "popular", "random"), strict=True):
        absent = _absent(rng, category, shown, asked)
        asked.append(absent)
        for item, answer in ((present, "yes"), (absent, "no")):
            text = _POPE_QUESTION.format(**_there(item.name))
            questions.append(Question(text, answer, {"category": category}))
    return Scene(things(shown, quarters(rng, 3)), background(rng)), questions


def _absent(rng: Random, category: str, shown: list[MiniObject], asked: list[MiniObject]) -> MiniObject:
    """An object that is not shown: like a shown one (adversarial), frequent (popular), or any (random)."""
    free = [item for item in pictured("unseen") if item not in shown and item not in asked]
    if category == "adversarial":
        free = [item for item in free if item.category in {one.category for one in shown}] or free
    elif category == "popular":
        free = [item for item in free if item.name in POPULAR]
    return rng.choice(free)


_BENCHMARKS = (
    *(mini_mme, mini_textvqa, mini_vsr, mini_snli_ve),
    *(mini_cifar10, mini_cifar100, mini_mnist, mini_pope),
)
UNSEEN_BENCHMARKS: dict[str, Benchmark] = {each.name: each for each in _BENCHMARKS}
"""By name, in the order of the paper's columns."""
