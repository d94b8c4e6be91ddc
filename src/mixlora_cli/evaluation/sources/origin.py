"""What the table of benchmarks says about where instances come from and how a row becomes a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mixlora_cli.errors import UserError

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


def question_of(ask: Callable[[Row], Question | None], row: Row, where: str) -> Question | None:
    """What `ask` makes of a row. Raises UserError that names the place where a value is of no use."""
    try:
        return ask(row)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


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
