"""The judge's prompt, word for word as in App. C of the paper, and how its reply is read."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
USER = (
    "Decide if the prediction is correct given the question and the answer. Questions: {Question} "
    "Answer: {Ground-truth Answer} Prediction: {Prediction} Your response should only be Yes or No."
)
TEMPLATE = f"{SYSTEM} USER: {USER} ASSISTANT:"
"""Vicuna's own conversation format, written out."""
DIGEST = hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16]
"""Goes into every result, so that a judge with other words is told apart."""

Verdict = Literal["yes", "no", "unparsed"]

_PLACE = re.compile(r"\{(Question|Ground-truth Answer|Prediction)\}")
# Markdown, quotes and brackets around the words are no part of them. "Yes or No" and "Yes/No" repeat the choice that
# the prompt gave; \b would take the underscore of "_Yes_" for a letter.
_VERDICT = re.compile(
    r"[\W_]*?(yes|no)(?![^\W_])(?![\W_]{0,3}(?:[/|]|[\W_]or[\W_])[\W_]{0,3}(?:yes|no)(?![^\W_]))",
    re.IGNORECASE,
)


def fill(template: str, question: str, answer: str, prediction: str) -> str:
    """Put the three texts into their places; braces inside them stay as they are."""
    texts = {"Question": question, "Ground-truth Answer": answer, "Prediction": prediction}
    return _PLACE.sub(lambda place: texts[place[1]], template)


def read_verdict(reply: str) -> Verdict:
    """Whether a judge's reply begins with Yes or No, in any case; everything else is "unparsed".

    The first word decides, whatever follows ("No. Yes" is no). A reply that repeats the choice ("Yes or No",
    "Yes/No") decides nothing and is unparsed as well.
    """
    match = _VERDICT.match(reply)
    if match is None:
        return "unparsed"
    return "yes" if match[1].lower() == "yes" else "no"
