"""VQA accuracy: one answer against several people's answers, after the normalisation that the field uses.

Rule: the answer processor of the VQA evaluation server in the form that Text-VQA's evaluators use (it also
takes commas and question marks out first and splits off "'s"), then the mean over leave-one-out of
min(matches / 3, 1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from mixlora_cli.evaluation.scorers import NUMBER_WORDS

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {**NUMBER_WORDS, "none": "0"}

_WITH_NOT = "ai are ca could did does do had has have is might must need sha should was were wo would"
_WITH_HAVE = "could i might must should they we would you what where who"
_WITH_WILL = "it that there they what who why you"
_WITH_ARE = "they what you"
# Contractions written without their apostrophe, except those that are words themselves (its, wed, ill, shell,
# were). None end in "'s": the normalisation has split that off before.
_CONTRACTIONS = {
    (stem + ending).replace("'", ""): stem + ending
    for stems, ending in ((_WITH_NOT, "n't"), (_WITH_HAVE, "'ve"), (_WITH_WILL, "'ll"), (_WITH_ARE, "'re"))
    for stem in stems.split()
} | {"im": "i'm", "oclock": "o'clock", "maam": "ma'am", "yall": "y'all"}


def _strip_punctuation(text: str) -> str:
    """Delete a mark where the text has it beside a space or has a comma between digits, else put a space in
    its place.

    Full stops go unless a digit follows, apostrophes stay. Spaces are taken as the text had them at the
    start.
    """
    digits = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or digits else " ")
    return _FULL_STOP.sub("", result)


@lru_cache(maxsize=65_536)
def normalise_vqa(text: str) -> str:
    """Lower case, punctuation, number words (none, zero .. ten) to digits, no articles, full contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    words = _strip_punctuation(" ".join(text.split())).split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over leave-one-out of min(matches / 3, 1), in [0, 1].

    For each of the n answers, the prediction is compared with the other n - 1. With ten answers this gives 0,
    0.3, 0.6, 0.9 for 0 to 3 matches and 1 from 4 on. Raises ValueError when there are no answers.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one reference answer")
    given = normalise_vqa(prediction)
    matches = sum(normalise_vqa(answer) == given for answer in answers)
    others = len(answers) - matches
    total = matches * min((matches - 1) / 3, 1.0) + others * min(matches / 3, 1.0)
    return total / len(answers)
