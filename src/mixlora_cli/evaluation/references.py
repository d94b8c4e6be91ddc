"""What answers are compared with, as users write it: a target, reference answers, a closed set of labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mixlora_cli.errors import cut
from mixlora_cli.evaluation.metrics import LABELS, MME, POPE, VQA, Metric
from mixlora_cli.evaluation.scorers import normalise_answer


def text_of(value: Any, key: str, expected: str = "a text") -> str:
    """The value itself. Raises ValueError that names `key` when it is no text."""
    if not isinstance(value, str):
        hint = "; put it in quotation marks" if type(value) in (int, float) else ""
        raise ValueError(f"{key} is {_spelt(value)}, expected {expected}{hint}")
    return value


def reference(value: Any, key: str, expected: str = 'a text or {"answer": text}') -> str:
    """One reference: a text, or VQAv2's `{"answer": text, ...}`. Raises ValueError for anything else."""
    is_object = isinstance(value, Mapping) and "answer" in value
    return text_of(value["answer"] if is_object else value, key, expected)


def references(row: Mapping[str, Any], metric: Metric | None = None) -> tuple[str, ...]:
    """Reference answers of a row or record, one or a list of them in `answers`; () without any.

    Raises ValueError for what is none, and for an empty list where `metric` counts references.
    """
    given = row.get("answers")
    if given is None:
        return ()
    entries = given if isinstance(given, list) else [given]
    if not entries and metric is VQA:
        raise ValueError(
            "answers is empty, expected one reference answer or more; without answers it is answer"
        )
    return tuple(reference(each, "answers", 'a text, {"answer": text} or a list of them') for each in entries)


def label_set(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The closed set in `labels`; () without one. Raises ValueError when it is no list of texts."""
    given = row.get("labels")
    if not isinstance(given, list | None):
        raise ValueError(f"labels is {_spelt(given)}, expected a list of texts")
    return tuple(text_of(each, "labels", "a list of texts") for each in given or ())


def require_reachable(target: str, labels: tuple[str, ...], metric: Metric) -> None:
    """Raise ValueError where no answer can be right by the metric's rule, or only one outside `labels`."""
    if metric in (MME, POPE) and target.strip().lower() not in ("yes", "no"):
        raise ValueError(
            f"answer is {_spelt(target)}, expected yes or no: {metric.name}'s rule reads nothing else"
        )
    if metric is LABELS and labels and normalise_answer(target) not in _normalised(labels):
        raise ValueError(f"answer is {_spelt(target)}, expected one of labels: {cut(', '.join(labels))}")


@lru_cache(maxsize=256)
def _normalised(labels: tuple[str, ...]) -> frozenset[str]:
    return frozenset(map(normalise_answer, labels))


def _spelt(value: Any) -> str:
    """A decoded JSON value, as JSON writes the words for nothing, true and false."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else cut(repr(value))
