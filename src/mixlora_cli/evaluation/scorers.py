"""How one answer is judged: pure functions of the text a model gave, each with the rule it follows.

`vqa.py` holds the one rule that needs several reference answers, `metrics.py` turns judged answers into a
benchmark's score.
"""

from __future__ import annotations

import re
import unicodedata
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
