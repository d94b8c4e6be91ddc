"""What a benchmark is: where its rows are, what is asked of each, and what an answer is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mixlora_cli.benchmarks.metrics import Metric
from mixlora_cli.benchmarks.scorers import normalise_answer
from mixlora_cli.errors import UserError, cut

Row = Mapping[str, Any]
"""One row of a benchmark's own table, pictures as {"bytes", "path"}."""


@dataclass(frozen=True)
class Question:
    """One instance: what is asked about the picture, and what scoring needs to know."""

    text: str
    answer: str
    id: str = ""
    instruction: str = ""
    """Line behind the question that asks for the form of the answer."""
    hint: str = ""
    """Line between the two that `eval.ocr_tokens=true` adds."""
    category: str = ""
    image_id: str = ""
    answers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def prompt(self, with_hint: bool = False) -> str:
        """The text that the model reads behind the picture."""
        lines = (self.text, self.hint if with_hint else "", self.instruction)
        return "\n".join(line for line in lines if line)


@dataclass(frozen=True)
class Origin:
    """Where a benchmark's rows are and how each is asked."""

    hub: tuple[str, ...]
    """Its names on the Hugging Face hub, tried in this order; empty where none of them can be loaded."""
    split: str
    rows: int
    """Rows of the whole split."""
    columns: tuple[str, ...]
    """What a row must have."""
    ask: Callable[[Row], Question | None]
    """A row's question; None for a row that is left out, and counted."""
    revision: str | None = None
    """Commit, branch or tag on the hub; None is the newest."""
    picture: str = "image"
    """Column of the picture; "" where pictures are files that the user fetches."""
    labels: tuple[str, ...] = ()
    """Names of the integers in column `label_column`, to compare with what the file says."""
    label_column: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Labels that the hub spells wrongly, and how `labels` has them."""
    categories: tuple[str, ...] = ()
    """Every value that column `category` may have; empty where there is no such column."""
    photos: Callable[[Row], tuple[str, ...]] | None = None
    """Relative paths that a row's picture may have, where the user fetches it."""
    records: str = ""
    """Name of the JSON lines file in a local folder, where the rows are no parquet files."""
    by_hand: str = ""
    """What has to be fetched by hand and what to put where."""

    def question(self, row: Row, where: str) -> Question | None:
        """What `ask` makes of a row. Raises UserError that names the place where a value is of no use."""
        try:
            return self.ask(row)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Benchmark:
    """An unseen task that is scored as a whole."""

    name: str
    """What records carry as `benchmark`, and what `eval.benchmarks` takes."""
    column: str
    """Its heading in tables: the paper's name."""
    metric: Metric
    origin: Origin | None = None
    """None for one that comes with the data (`data=mini`, or records of your own that carry its name)."""
    in_paper: bool = False
    """Whether it is one of the eight whose columns the paper's tables have."""
    num_subtasks: int = 0
    """How many subtasks the score is a sum over when all are answered; 0: it is no sum, or that is not known."""


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
    if not entries and metric is not None and metric.compares_with == "references":
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
    if metric.compares_with == "yes or no" and target.strip().lower() not in ("yes", "no"):
        raise ValueError(
            f"answer is {_spelt(target)}, expected yes or no: {metric.name}'s rule reads nothing else"
        )
    if metric.compares_with == "a label" and labels and normalise_answer(target) not in _normalised(labels):
        raise ValueError(f"answer is {_spelt(target)}, expected one of labels: {cut(', '.join(labels))}")


@lru_cache(maxsize=256)
def _normalised(labels: tuple[str, ...]) -> frozenset[str]:
    return frozenset(map(normalise_answer, labels))


def _spelt(value: Any) -> str:
    """A decoded JSON value, as JSON writes the words for nothing, true and false."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else cut(repr(value))
