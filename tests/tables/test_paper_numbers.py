"""The published numbers are those of the paper's text, row by row; skipped where that is not beside the checkout."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

import pytest

from mixlora_cli.reproduce.paper import TABLES, columns_of, published, rows_of

TEXT = Path(__file__).parents[3] / "shared" / "paper.txt"
needs_text = pytest.mark.skipif(not TEXT.is_file(), reason="the paper's text is not beside this checkout")


def printed_rows(first_heading: str, next_heading: str) -> list[list[str]]:
    """Lines of a table in the text, split into cells, without its heading."""
    text = TEXT.read_text()
    start = text.index(first_heading)
    lines = text[start : text.index(next_heading, start)].splitlines()[1:]
    return [line.split("\t") for line in lines if "\t" in line]


@needs_text
@pytest.mark.parametrize(
    ("table", "heading"),
    [("table1", "Model\tFactors\tRank\tMME"), ("table3", "Model\tFactors\tRank\tScienceQA")],
)
def test_rows_and_numbers_in_the_papers_order(table: str, heading: str) -> None:
    rows = printed_rows(heading, f"Table {table[-1]}:")
    for cells, row in zip(rows, rows_of(table), strict=True):
        name, factors, rank, *values = cells
        assert re.sub(r"[ {}]", "", name) == row.labels[0]
        assert (factors, rank) == row.labels[1:]
        assert [float(value) for value in values] == numbers_of(table, row.name)


@needs_text
def test_table_2() -> None:
    # The text has its last two rows run together: "MixLoRA MixLoRA	Instance Task	32 32	4 4	1509.61 1381.87	..."
    rows = printed_rows("Model\tRouting\tFactors\tRank\tMME\tMMAvg", "Table 2:")
    single = [list(cells) for line in rows for cells in zip(*(cell.split() for cell in line), strict=True)]
    assert [cells[:4] for cells in single] == [list(row.labels) for row in rows_of("table2")]
    for cells, row in zip(single, rows_of("table2"), strict=True):
        assert list(map(float, cells[4:])) == numbers_of("table2", row.name)


@needs_text
def test_headings() -> None:
    text = TEXT.read_text().lower()
    assert "\t".join((*TABLES["table1"].headings, *columns_of("table1", "paper"))).lower() in text


def numbers_of(table: str, name: str) -> list[float | None]:
    return [published(table, name, column) for column in columns_of(table, "paper")]


@pytest.mark.parametrize(("table", "averaged"), [("table1", slice(1, 8)), ("table3", slice(0, 6))])
def test_averages_are_those_of_their_rows(table: str, averaged: slice) -> None:
    """The paper's own averages hold: a slip in one of the numbers would show here, too."""
    for row in rows_of(table):
        values = [float(value or "nan") for value in numbers_of(table, row.name)]
        assert fmean(values[averaged]) == pytest.approx(values[-1], abs=0.006)


@pytest.mark.parametrize(
    ("table", "name", "column", "number"),
    [
        ("table1", "mixlora_e16_r4", "MMAvg", 64.10),
        ("table1", "mixlora_e16_r4", "MME", 1443.82),
        ("table3", "lora_r4", "PACS", 99.33),
        ("figure4", "mixlora_e16_r4", "MMAvg", 64.10),
        ("figure4", "mixlora_e16_r4_nocfs", "MMAvg", None),
        ("beyond", "straight_through", "MME", None),
        ("table1", "lora_r4", "my own benchmark", None),
    ],
)
def test_a_number_by_table_row_and_column(table: str, name: str, column: str, number: float | None) -> None:
    assert published(table, name, column) == number


def test_every_row_has_its_number() -> None:
    for table in ("table1", "table2", "table3"):
        assert all(None not in numbers_of(table, row.name) for row in rows_of(table))
    for row in rows_of("figure4"):
        assert published("figure4", row.name.removesuffix("_nocfs"), "MMAvg")
