"""Tables of texts: one content, on the screen, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import io

from rich.console import Console

from mixlora_cli.tables import Cell, Table, latex, markdown, show, to_csv

TABLE = Table(
    "Scores",
    ("model", "SNLI-VE", "MMAvg"),
    (("lora [r4]", Cell("31.5", "[29.0, 34.1]", "p 30.2"), "40.0"), ("mixlora | all", Cell("33.0"), "-")),
    notes=("In per cent.",),
    last_apart=True,
)


def printed(width: int, turn: bool = False) -> str:
    stream = io.StringIO()
    show(TABLE, Console(file=stream, force_terminal=True, color_system=None, width=width), turn=turn)
    return stream.getvalue()


def test_the_screen_stacks_intervals_and_keeps_brackets() -> None:
    lines = [line.strip() for line in printed(80).splitlines()]
    assert lines[0] == "Scores"
    assert "lora [r4]" in lines[4] and "31.5" in lines[4] and lines[5:7] == ["[29.0, 34.1]", "p 30.2"]
    assert "In per cent." in lines


def test_a_narrow_terminal_gets_it_on_its_side() -> None:
    assert "SNLI-VE" in printed(80, turn=True).splitlines()[2]
    narrow = printed(34, turn=True).splitlines()
    assert "lora [r4]" in narrow[3] and narrow[5].split()[:2] == ["SNLI-VE", "31.5"]


def test_markdown() -> None:
    assert markdown(TABLE) == (
        "## Scores\n\n| model | SNLI-VE | MMAvg |\n| --- | ---: | ---: |\n"
        "| lora [r4] | 31.5 [29.0, 34.1] p 30.2 | 40.0 |\n| mixlora \\| all | 33.0 | - |\n\nIn per cent.\n"
    )


def test_latex_escapes_and_makes_intervals_small() -> None:
    text = latex([TABLE])
    assert r"lora [r4] & 31.5 {\scriptsize [29.0, 34.1] p 30.2} & 40.0 \\" in text
    assert r"\caption{Scores. In per cent.}" in text
    assert r"LLaVA\textsubscript{Align} 5\,000" not in text
    assert r"LLaVA\textsubscript{Align} \& 5\%" in latex([Table("", ("x",), (("LLaVA_Align & 5%",),))])


def test_csv_leaves_what_is_not_known_empty() -> None:
    assert to_csv(("a", "b"), [(1, None), ("x, y", 0.25)]) == 'a,b\n1,\n"x, y",0.25\n'
