"""What a judge is: an identity, and replies to questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.scorers import label_match
from mixlora_cli.judging.identity import EXACT, Identity

Questions = Mapping[str, Prediction]
"""By `Identity.key`: what two predictions ask alike is asked once."""


class Judge(Protocol):
    """Anything that replies to the question whether a prediction is correct."""

    @property
    def identity(self) -> Identity:
        """Who judges."""

    def replies(self, questions: Questions) -> Iterator[dict[str, str]]:
        """Texts by key, a few at a time as they come; whoever asks stores each portion before the next.

        Raises UserError when it cannot go on; what it gave until then stays good.
        """


class ExactJudge:
    """The rule of label match: the same answer after normalisation, or the only label that it names."""

    identity = Identity(EXACT)

    def replies(self, questions: Questions) -> Iterator[dict[str, str]]:
        """All at once: it is a function of the texts."""
        yield {
            key: "Yes" if label_match(p.prediction, p.target, p.labels) else "No"
            for key, p in questions.items()
        }
