"""A table of texts that prints in a terminal and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mixlora_cli.analysis.bench.estimates import Estimate

MISSING = "-"


@dataclass(frozen=True)
class Grid:
    """The first `num_labels` columns name a row, the others hold its numbers."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_labels: int = 1

    def rich(self) -> Table:
        """For a console."""
        table = Table(
            title=Text(self.title),
            caption=Text(self.caption),
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for number, column in enumerate(self.columns):
            table.add_column(Text(column), justify="left" if number < self.num_labels else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """Title, table and caption."""
        rule = ["---" if number < self.num_labels else "---:" for number in range(len(self.columns))]
        lines = [self.columns, tuple(rule), *self.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        return f"### {self.title}\n\n{table}\n\n{self.caption}\n"


def ratio_text(estimate: Estimate | None, digits: int = 2) -> str:
    """`0.53 [0.41, 0.66]`; a count's ratio, which does not vary, has no interval."""
    if estimate is None:
        return MISSING
    if estimate.value is None:
        return "not resolved"
    value = f"{estimate.value:.{digits}f}"
    if estimate.low == estimate.high:
        return value
    low, high = (MISSING if end is None else f"{end:.{digits}f}" for end in (estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def milliseconds(seconds: float | None) -> str:
    """Three significant digits, or whole ones from 1,000 on."""
    if seconds is None:
        return MISSING
    time = 1e3 * seconds
    return f"{time:,.0f}" if abs(time) >= 1000 else f"{time:#.3g}".rstrip(".")


def mebibytes(count: int) -> str:
    """Three significant digits, or whole ones from 1,000 on."""
    size = count / 2**20
    return f"{size:,.0f}" if size >= 1000 else f"{size:#.3g}".rstrip(".")
