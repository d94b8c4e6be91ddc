"""Configuration of `mixlora table`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

TableName = Literal["table1", "table2", "table3", "figure4", "beyond", "seen", "control"]
MINI_ALONE = ("beyond", "seen", "control")
"""Tables that the paper does not have."""


@dataclass(frozen=True)
class TableConfig:
    """Everything that `mixlora table` reads."""

    runs: str
    """Folder with the cells that `mixlora reproduce` made."""
    output_dir: str
    """Where the table is written as Markdown, LaTeX and CSV."""
    what: TableName | None = None
    scale: Literal["mini", "paper"] = "mini"
    """paper: the paper's own numbers stand beside ours."""
    judge: str | None = None
    """Title of a judge whose scores are shown; null = each benchmark's own rule."""

    def __post_init__(self) -> None:
        if self.what is None:
            first, *others = get_args(TableName)
            raise ValueError(f"what=null: say which: `mixlora table {first}`, {', '.join(others)}")
        if self.what in MINI_ALONE and self.scale != "mini":
            raise ValueError(f"scale={self.scale}: `{self.what}` exists at scale=mini alone")
