"""Seen tasks about words and numbers that a picture shows in writing."""

from __future__ import annotations

from random import Random

from mixlora_cli.data.mini.canvas import SIZE, Scene
from mixlora_cli.data.mini.layout import background, writing
from mixlora_cli.data.mini.task import Draw, Task
from mixlora_cli.data.mini.vocabulary import calculations, two_digit_numbers, written_words

_HALF = SIZE // 2
_LEFT, _RIGHT = (0, 0, _HALF, SIZE), (_HALF, 0, SIZE, SIZE)


def _word_scene(rng: Random) -> tuple[Scene, str]:
    word = rng.choice(written_words("seen"))
    return Scene((writing(rng, word, (28, 42)),), background(rng)), word


def _read_word(rng: Random) -> Draw:
    scene, word = _word_scene(rng)
    return Draw(scene, word)


def _first_letter(rng: Random) -> Draw:
    scene, word = _word_scene(rng)
    return Draw(scene, word[0])


def _read_number(rng: Random) -> Draw:
    number = str(rng.choice(two_digit_numbers("seen")))
    return Draw(Scene((writing(rng, number, (32, 60)),), background(rng)), number)


def _calculate(rng: Random) -> Draw:
    text, result = rng.choice(calculations("seen"))
    return Draw(Scene((writing(rng, text, (30, 44)),), background(rng)), str(result))


def _compare_numbers(rng: Random) -> Draw:
    pair = rng.sample(two_digit_numbers("seen"), 2)
    ground = background(rng)
    items = (writing(rng, str(pair[0]), (34, 46), _LEFT), writing(rng, str(pair[1]), (34, 46), _RIGHT))
    larger = rng.random() < 0.5
    answer, size = (max(pair), "larger") if larger else (min(pair), "smaller")
    return Draw(Scene(items, ground), str(answer), {"size": size})


WRITING_TASKS = (
    Task(
        "word_reading",
        "Read the word that is written in the picture. The answer is the whole word in lower case.",
        ("What word is written?", "Read the word.", "Which word do the letters form?"),
        _read_word,
    ),
    Task(
        "first_letter",
        "Give only the first letter of the word that is written in the picture, in lower case.",
        (
            "What is the first letter of the word?",
            "With which letter does the word begin?",
            "Give only the initial letter.",
        ),
        _first_letter,
    ),
    Task(
        "number_reading",
        "Read the two-digit number that is written in the picture. The answer is in digits.",
        ("What number is written?", "Read the number.", "Which number do the digits form?"),
        _read_number,
    ),
    Task(
        "arithmetic",
        "The picture shows a small addition or subtraction. Answer with its result in digits.",
        (
            "What is the result of the calculation?",
            "Solve the written exercise.",
            "Work it out and give the result.",
        ),
        _calculate,
    ),
    Task(
        "number_comparison",
        "Two numbers are written in the picture. Answer with the larger or the smaller one, as asked.",
        (
            "Which number is {size}?",
            "Compare both numbers and write the {size} one.",
            "Of the two numbers, give the {size}.",
        ),
        _compare_numbers,
    ),
)
