"""Counterparts of CIFAR-10, CIFAR-100, MNIST and Text-VQA: name the object, the digit, the text."""

from __future__ import annotations

from random import Random

from mixlora_cli.data.mini.benchmark import Benchmark, Question
from mixlora_cli.data.mini.canvas import SIZE, Scene
from mixlora_cli.data.mini.digits import Digit, handwritten
from mixlora_cli.data.mini.layout import anywhere, background, quarters, thing, writing
from mixlora_cli.data.mini.objects import MiniObject
from mixlora_cli.data.mini.vocabulary import pictured, two_digit_numbers, written_words

TEN = ("airplane", "ambulance", "bird", "cat", "duck", "horse", "monkey", "pig", "tractor", "train")
"""The labels of mini_cifar10: animals and vehicles, as in CIFAR-10."""
_TEN_QUESTION = f"What is the object in the image? Please only answer a single object in [{', '.join(TEN)}]."
_OPEN_QUESTION = "What is the object in the image? Please answer with a single object name."
_DIGIT_QUESTION = (
    f"What is the number in the image? Please only answer a single number in [{', '.join('0123456789')}]."
)
_WORD_QUESTION = "What does the text in the image say?"
_NUMBER_QUESTION = "What is the number printed in the image?"
_UPPER, _LOWER = (0, 0, SIZE, SIZE // 2), (0, SIZE // 2, SIZE, SIZE)
_ANNOTATORS = 10


def _alone(rng: Random, item: MiniObject) -> Scene:
    return Scene((thing(item, anywhere(rng)),), background(rng))


def _one_of_ten(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    name = TEN[k % len(TEN)]
    item = next(item for item in pictured("unseen") if item.name == name)
    return _alone(rng, item), [Question(_TEN_QUESTION, name, {"labels": list(TEN)})]


def _one_of_all(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    names = [item.name for item in pictured("unseen")]
    item = pictured("unseen")[k % len(names)]
    return _alone(rng, item), [Question(_OPEN_QUESTION, item.name, {"labels": names})]


def _digit(rng: Random, k: int) -> tuple[Digit, list[Question]]:
    label = k % 10
    index, ink = rng.choice(handwritten()[label])
    digit = Digit(label, index, ink, rng.randint(110, 150))
    return digit, [Question(_DIGIT_QUESTION, str(label), {"labels": list("0123456789")})]


def _text(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """A word, or every fourth time a number, in one half of the picture and an object in the other."""
    number = k % 4 == 3
    text = str(rng.choice(two_digit_numbers("unseen"))) if number else rng.choice(written_words("unseen"))
    written = writing(rng, text, (32, 56) if number else (28, 40), rng.choice([_UPPER, _LOWER]))
    spot = quarters(rng, 1)[0]
    free_y = spot.y % (SIZE // 2) + (SIZE // 2 if written.y < SIZE // 2 else 0)
    item = thing(rng.choice(pictured("unseen")), spot._replace(y=free_y))
    question = _NUMBER_QUESTION if number else _WORD_QUESTION
    return Scene((written, item), background(rng)), [
        Question(question, text, {"answers": [text] * _ANNOTATORS})
    ]


NAMING_BENCHMARKS = (
    Benchmark(
        "mini_textvqa",
        "Read the text in a picture that also shows an object, and answer with the word or number.",
        (_WORD_QUESTION, _NUMBER_QUESTION),
        num_pictures=120,
        picture=_text,
    ),
    Benchmark(
        "mini_cifar10",
        "Name the object in the picture; the answer is one of the ten names that the question lists.",
        (_TEN_QUESTION,),
        num_pictures=120,
        picture=_one_of_ten,
    ),
    Benchmark(
        "mini_cifar100",
        "Name the object in the picture; the answer is one of many names that the question does not list.",
        (_OPEN_QUESTION,),
        num_pictures=2 * len(pictured("unseen")),
        picture=_one_of_all,
    ),
    Benchmark(
        "mini_mnist",
        "Read the handwritten digit in the picture.",
        (_DIGIT_QUESTION,),
        num_pictures=120,
        picture=_digit,
    ),
)
