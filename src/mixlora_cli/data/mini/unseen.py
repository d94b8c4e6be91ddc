"""The unseen benchmarks, counterparts of the paper's columns: how picture number k and its questions are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from mixlora_cli.data.mini.canvas import SIZE, Digit, Item, Picture, Scene, handwritten
from mixlora_cli.data.mini.layout import (
    anywhere,
    background,
    colour_on,
    ninths,
    one_above_other,
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


@dataclass(frozen=True)
class Question:
    """One question about a picture."""

    text: str
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the record that scoring reads: `category`, `answers`, `labels`."""


_Draw = Callable[[Random, int], tuple[Picture, list[Question]]]


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


# Text-VQA, CIFAR-10, CIFAR-100 and MNIST: name the text, the object, the digit.

TEN = ("airplane", "ambulance", "bird", "cat", "duck", "horse", "monkey", "pig", "tractor", "train")
"""The labels of mini_cifar10: animals and vehicles, as in CIFAR-10."""
_TEN_QUESTION = f"What is the object in the image? Please only answer a single object in [{', '.join(TEN)}]."
_OPEN_QUESTION = "What is the object in the image? Please answer with a single object name."
_DIGIT_QUESTION = (
    f"What is the number in the image? Please only answer a single number in [{', '.join('0123456789')}]."
)
_WORD_QUESTION = "What does the text in the image say?"
_NUMBER_QUESTION = "What is the number printed in the image?"
_ANNOTATORS = 10


def _called(name: str) -> MiniObject:
    return next(item for item in pictured("unseen") if item.name == name)


def _alone(rng: Random, item: MiniObject) -> Scene:
    return Scene((thing(item, anywhere(rng)),), background(rng))


@benchmark(_WORD_QUESTION, _NUMBER_QUESTION, num_pictures=120)
def mini_textvqa(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Read the text in a picture that also shows an object, and answer with the word or number."""
    # a word, or every fourth time a number, in one half of the picture and an object in the other
    upper, lower = (0, 0, SIZE, SIZE // 2), (0, SIZE // 2, SIZE, SIZE)
    number = k % 4 == 3
    text = str(rng.choice(two_digit_numbers("unseen"))) if number else rng.choice(written_words("unseen"))
    written = writing(rng, text, (32, 56) if number else (28, 40), rng.choice([upper, lower]))
    spot = quarters(rng, 1)[0]
    free_y = spot.y % (SIZE // 2) + (SIZE // 2 if written.y < SIZE // 2 else 0)
    item = thing(rng.choice(pictured("unseen")), spot._replace(y=free_y))
    question = Question(
        _NUMBER_QUESTION if number else _WORD_QUESTION, text, {"answers": [text] * _ANNOTATORS}
    )
    return Scene((written, item), background(rng)), [question]


@benchmark(_TEN_QUESTION, num_pictures=120)
def mini_cifar10(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Name the object in the picture; the answer is one of the ten names that the question lists."""
    name = TEN[k % len(TEN)]
    return _alone(rng, _called(name)), [Question(_TEN_QUESTION, name, {"labels": list(TEN)})]


@benchmark(_OPEN_QUESTION, num_pictures=2 * len(pictured("unseen")))
def mini_cifar100(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Name the object in the picture; the answer is one of many names that the question does not list."""
    names = [item.name for item in pictured("unseen")]
    item = pictured("unseen")[k % len(names)]
    return _alone(rng, item), [Question(_OPEN_QUESTION, item.name, {"labels": names})]


@benchmark(_DIGIT_QUESTION, num_pictures=120)
def mini_mnist(rng: Random, k: int) -> tuple[Digit, list[Question]]:
    """Read the handwritten digit in the picture."""
    label = k % 10
    index, ink = rng.choice(handwritten()[label])
    digit = Digit(label, index, ink, rng.randint(110, 150))
    return digit, [Question(_DIGIT_QUESTION, str(label), {"labels": list("0123456789")})]


# VSR, SNLI-VE and POPE: judge a spatial statement, a hypothesis, an object's presence.

RELATIONS = (("to the left of", "to the right of"), ("above", "below"))
"""(relation of the first to the second thing, its opposite): side by side, and one above the other."""
VERDICTS = ("entailment", "neutral", "contradiction")
POPULAR = ("cat", "horse", "tomato", "train", "umbrella", "door", "camera", "cloud")
"""The objects that POPE's pictures show most often; absent ones are asked for in its category "popular"."""
_UNKNOWABLE = (
    "{The} {is_} a gift from a friend.",
    "{The} {is_} owned by a doctor.",
    "Someone will move the {name} tomorrow.",
    "Nobody has seen the {name} before.",
)
_VSR_QUESTION = 'Statement: "{statement}" Is the statement correct? Answer yes or no.'
_ENTAILMENT_QUESTION = (
    'The image is the premise. Hypothesis: "{hypothesis}" Is it entailment, neutral or contradiction?'
)
_POPE_QUESTION = "{Is_} there {a} in the image?"


def _related(rng: Random) -> tuple[Scene, list[MiniObject], tuple[str, str]]:
    """Two objects and (their true relation, its opposite), told of the first object."""
    pair = rng.sample(pictured("unseen"), 2)
    beside = rng.random() < 0.5
    spots = side_by_side(rng) if beside else one_above_other(rng)
    scene = Scene(things(pair, spots), background(rng))
    true, false = RELATIONS[0 if beside else 1]
    if rng.random() < 0.5:
        return scene, pair[::-1], (false, true)
    return scene, pair, (true, false)


def _statement(pair: list[MiniObject], relation: str) -> str:
    return f"The {pair[0].name} {is_or_are(pair[0].name)} {relation} the {pair[1].name}."


@benchmark(_VSR_QUESTION, num_pictures=120)
def mini_vsr(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Decide whether a statement about where two objects are is correct. Answer yes or no."""
    scene, pair, relations = _related(rng)
    text = _VSR_QUESTION.format(statement=_statement(pair, relations[k % 2]))
    return scene, [Question(text, ("yes", "no")[k % 2], {"labels": ["yes", "no"]})]


@benchmark(_ENTAILMENT_QUESTION, num_pictures=120)
def mini_snli_ve(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Decide whether the picture entails a hypothesis, contradicts it, or leaves it open (neutral)."""
    scene, pair, relations = _related(rng)
    verdict = VERDICTS[k % 3]
    text = _ENTAILMENT_QUESTION.format(hypothesis=_hypothesis(rng, verdict, pair, relations))
    return scene, [Question(text, verdict, {"labels": list(VERDICTS)})]


def _hypothesis(rng: Random, verdict: str, pair: list[MiniObject], relations: tuple[str, str]) -> str:
    if verdict == "neutral":
        name = pair[0].name
        return rng.choice(_UNKNOWABLE).format(The=f"The {name}", is_=is_or_are(name), name=name)
    true = verdict == "entailment"
    form = rng.randrange(3)
    if form == 0:
        return _statement(pair, relations[0 if true else 1])
    if form == 1:
        return f"There are {'two' if true else rng.choice(['three', 'four', 'five'])} things."
    name = (pair[0] if true else rng.choice([item for item in pictured("unseen") if item not in pair])).name
    return f"There {is_or_are(name)} {with_article(name)}."


@benchmark(_POPE_QUESTION, num_pictures=20, pairs=True)
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
