"""What is read as a record, and what each bad one is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.data.problems import BadRecord, Kind, Problem
from mixlora_cli.data.records import Record, parse_record, read_annotations
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError, cut

from .conftest import raw, turns

EMPTY_LIST = "conversations must be a non-empty list of {from, value}"
ONE_PATH = "image must be one relative path, got"
IN_RECORD = "...: the picture is in the record (base64); write it to a file and give its name"
TWO = "a record may have one"


def mistake(record: Any, images: Path | None) -> tuple[Kind, str]:
    with pytest.raises(BadRecord) as caught:
        parse_record(0, record, images)
    return caught.value.kind, caught.value.detail


def test_a_good_record(images) -> None:
    assert parse_record(3, raw(benchmark="mini_mme", answers=["red"]), images) == Record(
        index=3,
        id="a",
        task="colour",
        images=(images / "red.png",),
        conversation=(Turn("human", "<image>\nwhat colour?"), Turn("gpt", "red")),
        extra={"benchmark": "mini_mme", "answers": ["red"]},
    )
    parsed = parse_record(3, turns("hello", "hi"), None)  # of plain LLaVA files
    assert (parsed.id, parsed.task, parsed.images) == ("3", "unnamed", ())
    assert parse_record(0, raw(**turns("<image>", "red")), images).conversation[0].text == "<image>"


MALFORMED = [
    ({"conversations": []}, EMPTY_LIST),
    ({"conversations": None}, EMPTY_LIST),
    ({"conversations": ["x"]}, "turn 0 must be from 'human', got None"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "turn 0 must be from 'human', got 'gpt'"),
    ({"conversations": [{"from": "human"}]}, "turn 0 has no text in 'value'"),
    (turns("<image>\nq"), "the conversation must end with an answer from 'gpt'"),
    (turns("<image>\nq", "a", " \n", "b"), "the question of turn 2 is empty"),
    ({"task_name": 7}, "task_name must be a non-empty string, got 7"),
    ({"task_name": ["x" * 300]}, f"task_name must be a non-empty string, got ['{'x' * 75}..."),
    ({"image": ["red.png"]}, f"{ONE_PATH} ['red.png']"),
    ({"image": ""}, f"{ONE_PATH} ''"),
    ({"image": "a\0b"}, f"{ONE_PATH} 'a\\x00b'"),
    ({"image": {"bytes": "x" * 300}}, f"{ONE_PATH} {{'bytes': '{'x' * 66}..."),
    ({"image": f"data:image/png;base64,{'A' * 300}"}, f"data:image/png;base64,{'A' * 55}{IN_RECORD}"),
    ({"image": "A" * 5000}, "A" * 77 + IN_RECORD),
    ({"images": ["red.png", "blue.png"]}, f"images has 2 pictures, {TWO}"),
    ({"images": ["blue.png"]}, f"image and images name two pictures, {TWO}"),
    ({"image": None, "images": "red.png"}, "images must be a list with one path, got 'red.png'"),
    ({"image": None, "images": [None]}, "images must be a list with one path, got [None]"),
    ({"image": None, "images": [{"path": "a"}]}, f"{ONE_PATH} {{'path': 'a'}}"),
    *(
        ({"image": None, key: value}, f"no image, but {key}; the key is image")
        for key, value in {
            "image_path": "red.png",
            "Image": "red.png",
            "img_paths": ["red.png"],
            "imageUrl": "http://a",
        }.items()
    ),
]
OTHERS = [
    (turns("<image>\nq", " \n"), Kind.EMPTY_ANSWER, "turn 1"),
    (turns("<image>\nq", "<image>"), Kind.IMAGE_MARKER, "<image> in the answer of turn 1"),
    (turns("<image><image>\nq", "a"), Kind.IMAGE_MARKER, "2 <image> for 1 image"),
    ({"image": None, **turns("<image>\nq", "a")}, Kind.IMAGE_MARKER, "1 <image> for 0 image"),
    ({"image": "green.png"}, Kind.MISSING_IMAGE, "green.png"),
    ({"image": "g" * 300}, Kind.MISSING_IMAGE, "g" * 77 + "..."),
    ({"image": "."}, Kind.MISSING_IMAGE, ". is not a file"),
    (turns("<image>\nq", "nice \ud83d"), Kind.NOT_UNICODE, "lone surrogate U+D83D in conversations"),
    (turns("<image>\nq\udc00", "a"), Kind.NOT_UNICODE, "lone surrogate U+DC00 in conversations"),
    ({"image": "p\ud83d.png"}, Kind.NOT_UNICODE, "lone surrogate U+D83D in image"),
    ({"task_name": "\udfff"}, Kind.NOT_UNICODE, "lone surrogate U+DFFF in task_name"),
    ({"answers": [{"answer": "\ud800"}]}, Kind.NOT_UNICODE, "lone surrogate U+D800 in answers"),
    ({"\ud800": 1}, Kind.NOT_UNICODE, "lone surrogate U+D800 in \\ud800"),
]


@pytest.mark.parametrize(
    ("changes", "kind", "detail"),
    [*((changes, Kind.MALFORMED, detail) for changes, detail in MALFORMED), *OTHERS],
)
def test_a_bad_record_says_what_is_wrong(images, changes, kind, detail) -> None:
    assert mistake(raw(**changes), images) == (kind, detail)


def test_a_record_that_is_no_object(images) -> None:
    assert mistake("red", images) == (Kind.MALFORMED, "expected an object, got str")


@pytest.mark.parametrize(
    "text",
    ["\u200b", "\ufeff", "\0", "\xa0", "\u2060\u200e\t", "\u3164", "\u2800", "\ufe0f", "\x7f\x1b", "\u2028"],
)
def test_a_text_that_shows_nothing_is_empty(images, text) -> None:
    assert mistake(raw(**turns("<image>\nq", text)), images) == (Kind.EMPTY_ANSWER, "turn 1")
    asked = raw(**turns("<image>\nq", "a", text, "b"))
    assert mistake(asked, images) == (Kind.MALFORMED, "the question of turn 2 is empty")
    full = raw(**turns("<image>\nq", f"{text}7{text}"))
    assert parse_record(0, full, images).conversation[1].text == f"{text}7{text}"


@pytest.mark.parametrize("answer", ["?", "\u00e9", "\U0001f600", "\ue000", "\u0301", "-"])
def test_an_answer_that_shows_something_is_one(images, answer) -> None:
    assert parse_record(0, raw(**turns("<image>\nq", answer)), images).conversation[1].text == answer


@pytest.mark.parametrize(
    ("changes", "image", "extra"),
    [
        ({"image": None, "images": ["red.png"]}, "red.png", {}),
        ({"image": "red.png", "images": ["red.png"]}, "red.png", {}),
        ({"image_path": "x/red.png", "Image": "red"}, "red.png", {"image_path": "x/red.png", "Image": "red"}),
        ({"image": None, "images": [], **turns("q", "a")}, None, {}),
        ({"image": None, "images": None, **turns("q", "a")}, None, {}),
        ({"image": None, "image_id": "7", **turns("q", "a")}, None, {"image_id": "7"}),
        ({"image": None, "image_path": "", **turns("q", "a")}, None, {"image_path": ""}),
    ],
)
def test_the_keys_that_may_name_a_picture(images, changes, image, extra) -> None:
    record = parse_record(0, raw(**changes), images)
    assert (record.images, record.extra) == (() if image is None else (images / image,), extra)


def test_paths_that_leave_the_image_folder_and_those_that_stay(images) -> None:
    secret = images.parent / "secret.png"
    secret.write_bytes(b"x")
    (images / "link.png").symlink_to(secret)
    (images / "up").symlink_to(images.parent)
    (images / "alias.png").symlink_to(images / "red.png")
    (images / "sub").mkdir()
    for name in ("../secret.png", "link.png", "up/secret.png", "a/../../secret.png"):
        told = f"{name} leads to {secret}, outside {images}"
        assert mistake(raw(image=name), images) == (Kind.ESCAPING_IMAGE, told)
    absolute = f"{cut(f'{images}/red.png')} is absolute, expected a path relative to {images}"
    assert mistake(raw(image=f"{images}/red.png"), images) == (Kind.ESCAPING_IMAGE, absolute)
    for name in ("alias.png", "sub/../red.png", "./red.png"):
        assert parse_record(0, raw(image=name), images).images == (images / name,)


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
