"""VQA accuracy: one answer against several people's answers, after the normalisation that the field uses.

Rule: the answer processor of the VQA evaluation server in the form that Text-VQA's evaluators use (it also
takes commas and question marks out first and splits off "'s"), then the mean over leave-one-out of
min(matches / 3, 1). The rule is made for ten answers; with fewer than four, none can have three others like
it, and the mark is the share of the answers that match.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from mixlora_cli.evaluation.scorers import NUMBER_WORDS

_OTHERS = 3
"""Others that must have given an answer for it to be wholly right."""
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {**NUMBER_WORDS, "none": "0"}

# The contractions that the field's answer processor completes, by their endings. It has no more: "im", "ive", "wed",
# "shell" and "its" stay as they are, and what has "'s" was split there before.
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'d": "he how it somebody someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who y'all you",
}
_FULL = [stem + ending for ending, stems in _ENDINGS.items() for stem in stems.split()]
_FULL += ["ma'am", "o'clock", "'twas", "y'all"]
_CONTRACTIONS = {
    full[:at] + full[at + 1 :]: full for full in _FULL for at, mark in enumerate(full) if mark == "'"
}
"""Each contraction by its spellings with one apostrophe missing."""


def _strip_punctuation(text: str) -> str:
    """Delete a mark where the text has it beside a space or has a comma between digits, else put a space in
    its place.

    Full stops go unless a digit follows (the first 32 of them, as there), apostrophes stay. Spaces are taken as the
    text had them at the start.
    """
    digits = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or digits else " ")
    return _FULL_STOP.sub("", result, count=32)


@lru_cache(maxsize=65_536)
def normalise_vqa(text: str) -> str:
    """Lower case, punctuation, number words (none, zero .. ten) to digits, no articles, full contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    words = _strip_punctuation(text.strip().replace("\n", " ").replace("\t", " ").strip()).split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over leave-one-out of min(matches / 3, 1), in [0, 1].

    For each of the n answers, the prediction is compared with the other n - 1. With ten answers this gives 0,
    0.3, 0.6, 0.9 for 0 to 3 matches and 1 from 4 on. With fewer than four answers it is matches / n, which is
    the rule with n - 1 in place of 3. Raises ValueError when there are no answers.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one reference answer")
    given = normalise_vqa(prediction)
    matches = sum(normalise_vqa(answer) == given for answer in answers)
    if len(answers) < _OTHERS + 1:
        return matches / len(answers)
    others = len(answers) - matches
    total = matches * min((matches - 1) / _OTHERS, 1.0) + others * min(matches / _OTHERS, 1.0)
    return total / len(answers)
