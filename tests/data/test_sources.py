"""From files of records to unchecked records: JSON, Parquet, Arrow, data sets of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixlora_cli.data.problems import Kind, Problem
from mixlora_cli.data.sources import read_annotations
from mixlora_cli.errors import UserError


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "train.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_json_list_and_json_lines_read_alike(tmp_path) -> None:
    rows = [{"id": 1}, {"id": 2, "text": "a\u2028b"}]
    as_list = read_annotations(written(tmp_path, "\ufeff" + json.dumps(rows, indent=1)))
    assert as_list == ([(0, rows[0]), (1, rows[1])], [])
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    assert read_annotations(written(tmp_path, lines)) == as_list
    mixed = b'{"id": 1}\r\n{"id": 2}\r{"id": 3}\n'  # line breaks of every system
    assert read_annotations(written(tmp_path, mixed)) == (
        [(0, {"id": 1}), (1, {"id": 2}), (2, {"id": 3})],
        [],
    )


@pytest.mark.parametrize(
    ("text", "whole", "detail"),
    [
        (
            '[\n{"id": 1},\n{"id": 2},\n{"id": "thr',
            2,
            "Unterminated string starting at at line 4 column 8 (character 31 of 35)",
        ),
        ('[{"id": 1}', 1, "Expecting ',' or ']' at line 1 column 11 (character 10 of 10)"),
        ('[{"id": 1}, ', 1, "Expecting value at line 1 column 13 (character 12 of 12)"),
        ('[{"id": 1}] x', 1, "Text after the end of the list at line 1 column 11 (character 10 of 13)"),
        ("[", 0, "Expecting value at line 1 column 2 (character 1 of 1)"),
    ],
)
def test_a_list_that_breaks_off(tmp_path, text, whole, detail) -> None:
    records, problems = read_annotations(written(tmp_path, text))
    assert records == [(n, {"id": n + 1}) for n in range(whole)]
    assert problems == [Problem(whole, Kind.CUT_SHORT, f"{detail}, after {whole} whole records")]


HUGE, DEEP = "9" * 5000, "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ('{"id": ', "line 2 is not JSON: Expecting value at column 8"),
        (f'{{"id": {HUGE}}}', "line 2: malformed JSON: a number with thousands of digits"),
        (f'{{"id": {DEEP}}}', "line 2: malformed JSON: nested too deeply, thousands of brackets"),
    ],
)
def test_a_broken_line_costs_that_line_alone(tmp_path, line, detail) -> None:
    records, (problem,) = read_annotations(written(tmp_path, f'{{"id": 1}}\n{line}\n{{"id": 3}}\n'))
    assert records == [(0, {"id": 1}), (2, {"id": 3})]
    assert (problem.index, problem.kind) == (1, Kind.MALFORMED)
    assert problem.detail.startswith(detail)


NO_RECORDS = r"train\.json: expected a JSON list of records or JSON lines"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", NO_RECORDS),
        ("id,image\n1,a.png\n", NO_RECORDS),
        ('{\n "colour": {"definition": "x"}\n}', NO_RECORDS),
        ("3", NO_RECORDS),
        (b'["\xff"]', "not UTF-8 text at byte 2"),
        (b'\xef\xbb\xbf["\xff"]', "not UTF-8 text at byte 5"),
        (f"[{HUGE}]", r"train\.json: malformed JSON: a number with thousands of digits"),
        (f'[{{"id": {DEEP}}}]', r"train\.json: malformed JSON: nested too deeply, thousands of brackets"),
    ],
)
def test_files_that_hold_no_records(tmp_path, content, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_annotations(written(tmp_path, content))
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        read_annotations(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_annotations(tmp_path)
