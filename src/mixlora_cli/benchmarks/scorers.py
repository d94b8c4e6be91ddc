"""How one answer is judged: pure functions of the text a model gave, each with the rule it follows.

`metrics.py` turns scores of answers into a benchmark's score.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_LEAD_IN = re.compile(r"^(?:the )?(?:final )?answer(?: is)?\b ?")
_ARTICLE = re.compile(r"^(?:an?|the) ")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def _keeps(text: str, at: int) -> bool:
    """Whether the punctuation mark `text[at]` belongs to a number: the point of 3.5, the sign of -3."""
    if not text[at + 1 : at + 2].isdigit():
        return False
    if text[at] == ".":
        return text[at - 1 : at].isdigit()
    return text[at] == "-" and (at == 0 or text[at - 1].isspace())


@lru_cache(maxsize=65_536)  # the answers to closed questions are few
def _words(text: str) -> str:
    """Unicode compatibility form (full-width digits become ASCII), folded case, punctuation to spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _THOUSANDS.sub("", text).replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
    marks = (
        " " if unicodedata.category(mark).startswith("P") and not _keeps(text, at) else mark
        for at, mark in enumerate(text)
    )
    return " ".join("".join(marks).split())


@lru_cache(maxsize=65_536)
def normalise_answer(text: str) -> str:
    """Bring an answer to the form in which two spellings of the same answer are equal.

    Rule (ours): Unicode NFKC, folded case, apostrophes and thousands commas dropped, other punctuation to
    spaces except in numbers, a leading "(the) (final) answer (is):" and then a leading article dropped, and
    an answer that is one number word from zero to ten written as digits. Nothing is dropped that would leave
    no answer at all.
    """
    words = _words(text)
    for opening in (_LEAD_IN, _ARTICLE):
        words = opening.sub("", words, count=1) or words
    return NUMBER_WORDS.get(words, words)


def exact_match(prediction: str, target: str) -> bool:
    """Whether both are the same after `normalise_answer`; an empty prediction is never right.

    Answers that are punctuation alone ("?") normalise to nothing and are compared as they stand.
    """
    given, wanted = normalise_answer(prediction), normalise_answer(target)
    if not given or not wanted:
        return bool(prediction.strip()) and prediction.strip() == target.strip()
    return given == wanted


_IN_WORDS = {digits: word for word, digits in NUMBER_WORDS.items()}
_PRONOUN = "one"
_JOINING = frozenset(("or", "and"))


@lru_cache(maxsize=512)
def _label_names(labels: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """What answers call the labels: a pattern, and the label in `normalise_answer`'s spelling by each name.

    The pattern matches, at every position that starts a word, the longest name that ends with a word. A label with
    numbers from 0 to 10 is called by their words too.
    """
    spelt = {_words(label) for label in labels} - {""}
    names = {" ".join(_IN_WORDS.get(word, word) for word in name.split()): name for name in spelt}
    names |= {name: name for name in spelt}
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name)))
    pattern = rf"(?<![\w.-])(?=({alternatives})(?!\w|\.\d))" if names else r"(?!)"
    return re.compile(pattern), {name: normalise_answer(label) for name, label in names.items()}


def _joined(words: str, start: int, end: int) -> bool:
    """Whether "or" or "and" stands beside the word at `words[start:end]`."""
    before, after = words[:start].split()[-1:], words[end:].split()[:1]
    return not _JOINING.isdisjoint(before + after)


def named_labels(prediction: str, labels: tuple[str, ...]) -> set[str]:
    """The labels that an answer names as whole words, in `normalise_answer`'s spelling.

    A label inside a longer one that is named there too does not count: "a maple tree" names "maple tree", not
    "tree". Number words stand for digits: "seven or 1" names 7 and 1. "One" beside other labels does so only next to
    "or" or "and": "this one is a 7" names 7 alone.
    """
    words = _words(prediction)
    pattern, names = _label_names(labels)
    named: set[str] = set()
    pronouns: set[str] = set()
    reach = 0
    for match in pattern.finditer(words):
        if match.end(1) > reach:
            reach = match.end(1)
            pronoun = match[1] == _PRONOUN and _PRONOUN not in labels and not _joined(words, *match.span(1))
            (pronouns if pronoun else named).add(names[match[1]])
    return named or pronouns


def label_match(prediction: str, target: str, labels: tuple[str, ...] = ()) -> bool:
    """Whether the answer is the target label.

    Rule (ours): the exact normalised match, or, with a closed set of `labels`, the target is the only label
    that the answer names. Two labels in one answer are wrong, whichever comes first. Negation is not read:
    "not a cat" names cat.
    """
    if exact_match(prediction, target):
        return True
    return bool(labels) and named_labels(prediction, labels) == {normalise_answer(target)}


def yes_no(prediction: str) -> Literal["yes", "no", "other"]:
    """Read a yes/no answer as MME's official tool does.

    Rule (MME, `calculation.py` of the benchmark's evaluation tool): lower case; exactly "yes" or "no" counts,
    else "yes", else "no", anywhere within the first four characters, else "other", which is always wrong. By
    this rule "None" and "know" read as no, and "I do not" as other.
    """
    text = prediction.lower()
    if text in ("yes", "no"):
        return "yes" if text == "yes" else "no"
    if "yes" in text[:4]:
        return "yes"
    return "no" if "no" in text[:4] else "other"


def pope_answer(prediction: str) -> Literal["yes", "no"]:
    """Read an answer as POPE's common parser does.

    Rule (POPE, the authors' `evaluate.py`): keep what stands before the first full stop, drop commas, split
    at spaces; any of the words "No", "no", "not" means no, everything else means yes. So "NO", "don't" and an
    empty answer read as yes.
    """
    words = prediction.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "no", "not") for word in words) else "yes"


def mme_right(prediction: str, target: str) -> bool:
    """Whether an MME answer, read by `yes_no`, is its target."""
    return yes_no(prediction) == target.strip().lower()


def pope_right(prediction: str, target: str) -> bool:
    """Whether a POPE answer, read by `pope_answer`, is its target."""
    return pope_answer(prediction) == target.strip().lower()


_OTHERS = 3
"""Others that must have given an answer for it to be wholly right."""
_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_VQA_ARTICLES = frozenset(("a", "an", "the"))
_VQA_NUMBERS = {**NUMBER_WORDS, "none": "0"}

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
    for mark in _VQA_MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or digits else " ")
    return _FULL_STOP.sub("", result, count=32)


@lru_cache(maxsize=65_536)
def normalise_vqa(text: str) -> str:
    """Lower case, punctuation, number words (none, zero .. ten) to digits, no articles, full contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    words = _strip_punctuation(text.strip().replace("\n", " ").replace("\t", " ").strip()).split()
    words = [_VQA_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _VQA_ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over leave-one-out of min(matches / 3, 1), in [0, 1].

    Rule: the answer processor of the VQA evaluation server in the form that Text-VQA's evaluators use (it also takes
    commas and question marks out first and splits off "'s"), then that mean, which is made for ten answers.

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
