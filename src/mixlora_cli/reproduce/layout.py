"""The tables with their rows, in the paper's order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mixlora_cli.reproduce.paper import ABSENT, AVERAGE_TITLE, TABLES, columns_of, rows_of

__all__ = ["ABSENT", "AVERAGE_TITLE", "LAYOUTS", "Layout", "Pair", "Row", "Scale"]
Scale = Literal["mini", "paper"]


@dataclass(frozen=True)
class Row:
    """One model of a table."""

    experiment: str
    labels: tuple[str, ...]
    title: str
    per_task: bool = False


@dataclass(frozen=True)
class Pair:
    """Two rows whose difference is tested."""

    left: str
    right: str
    why: str


@dataclass(frozen=True)
class Layout:
    """One table."""

    name: str
    title: str
    headings: tuple[str, ...]
    columns: tuple[str, ...] | None
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...] = ()

    @property
    def on_seen_tasks(self) -> bool:
        """Whether held-out instances of training tasks are scored, not the unseen benchmarks."""
        return self.columns is None

    def row(self, experiment: str) -> Row:
        """The row of this experiment."""
        return next(row for row in self.rows if row.experiment == experiment)


LAYOUTS = {
    name: Layout(
        name,
        table.title,
        table.headings,
        None if table.on_seen_tasks else columns_of(name, "mini"),
        tuple(Row(row.name, row.labels, row.title, row.per_task) for row in rows_of(name)),
        tuple(Pair(*pair) for pair in table.pairs),
    )
    for name, table in TABLES.items()
}
