"""The published numbers are those of the paper's text, row by row; skipped where that is not beside the checkout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mixlora_cli.reproduce import paper
from mixlora_cli.reproduce.layout import FIGURE_4, LAYOUTS, TABLE_1, TABLE_2, TABLE_3, Layout

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
    ("layout", "numbers", "heading"),
    [
        (TABLE_1, paper.TABLE_1, "Model\tFactors\tRank\tMME"),
        (TABLE_3, paper.TABLE_3, "Model\tFactors\tRank\tScienceQA"),
    ],
)
def test_rows_and_numbers_in_the_papers_order(layout: Layout, numbers: paper.Numbers, heading: str) -> None:
    rows = printed_rows(heading, f"Table {layout.name[-1]}:")
    assert len(rows) == len(layout.rows) == len(numbers)
    for cells, row in zip(rows, layout.rows, strict=True):
        name, factors, rank, *values = cells
        assert re.sub(r"[ {}]", "", name) == row.labels[0]
        assert (factors, rank) == row.labels[1:]
        assert [float(value) for value in values] == list(numbers[row.experiment])


@needs_text
def test_table_2() -> None:
    # The text has its last two rows run together: "MixLoRA MixLoRA	Instance Task	32 32	4 4	1509.61 1381.87	..."
    rows = printed_rows("Model\tRouting\tFactors\tRank\tMME\tMMAvg", "Table 2:")
    single = [list(cells) for line in rows for cells in zip(*(cell.split() for cell in line), strict=True)]
    assert [cells[:4] for cells in single] == [list(row.labels) for row in TABLE_2.rows]
    for cells, row in zip(single, TABLE_2.rows, strict=True):
        assert tuple(map(float, cells[4:])) == paper.TABLE_2[row.experiment]


@needs_text
def test_headings() -> None:
    text = TEXT.read_text().lower()
    assert "\t".join((*TABLE_1.headings, *(TABLE_1.columns or ()))).lower() in text


def test_averages_are_those_of_their_rows() -> None:
    """The paper's own averages hold: a slip in one of the numbers would show here, too."""
    for values in paper.TABLE_1.values():
        assert sum(values[1:8]) / 7 == pytest.approx(values[8], abs=0.006)
    for values in paper.TABLE_3.values():
        assert sum(values[:6]) / 6 == pytest.approx(values[6], abs=0.006)


def test_a_number_by_table_row_and_column() -> None:
    assert paper.published("table1", "mixlora_e16_r4", "MMAvg") == 64.10
    assert paper.published("table1", "mixlora_e16_r4", "MME") == 1443.82
    assert paper.published("table3", "lora_r4", "PACS") == 99.33
    assert paper.published("figure4", "mixlora_e16_r4", "MMAvg") == 64.10
    assert paper.published("figure4", "mixlora_e16_r4_nocfs", "MMAvg") is None
    assert paper.published("beyond", "straight_through", "MME") is None
    assert paper.published("table1", "lora_r4", "my own benchmark") is None


def test_every_row_has_its_number() -> None:
    for name in ("table1", "table2", "table3"):
        numbers = getattr(paper, f"TABLE_{name[-1]}")
        assert list(numbers) == [row.experiment for row in LAYOUTS[name].rows]
    assert all(row.experiment.removesuffix("_nocfs") in paper.TABLE_1 for row in FIGURE_4.rows)
