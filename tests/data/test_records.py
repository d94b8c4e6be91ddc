from __future__ import annotations

import json
import os

import pytest

from mixlora_cli.data.problems import BadRecord, Kind, Problem
from mixlora_cli.data.records import Record, parse_record, read_annotations
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError


def turns(*values: str) -> dict[str, list[dict[str, str]]]:
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]}


def kind_and_detail(raw, images) -> tuple[Kind, str]:
    with pytest.raises(BadRecord) as caught:
        parse_record(0, raw, images)
    return caught.value.kind, caught.value.detail


def test_a_good_record(make_raw, images) -> None:
    assert parse_record(3, make_raw(benchmark="mini_mme", answers=["red"]), images) == Record(
        index=3,
        id="a",
        task="colour",
        image=images / "red.png",
        conversation=(Turn("human", "<image>\nwhat colour?"), Turn("gpt", "red")),
        extra={"benchmark": "mini_mme", "answers": ["red"]},
    )


def test_text_only_and_plain_llava_fields(images) -> None:
    parsed = parse_record(3, turns("hello", "hi"), None)
    assert (parsed.id, parsed.task, parsed.image) == ("3", "unnamed", None)


def test_a_question_may_be_the_picture_alone(make_raw, images) -> None:
    assert parse_record(0, make_raw(**turns("<image>", "red")), images).conversation[0].text == "<image>"


@pytest.mark.parametrize(
    ("changes", "kind", "detail"),
    [
        ({"conversations": []}, Kind.MALFORMED, "conversations must be a non-empty list of {from, value}"),
        ({"conversations": None}, Kind.MALFORMED, "conversations must be a non-empty list of {from, value}"),
        ({"conversations": ["x"]}, Kind.MALFORMED, "turn 0 must be from 'human', got None"),
        (
            {"conversations": [{"from": "gpt", "value": "x"}]},
            Kind.MALFORMED,
            "turn 0 must be from 'human', got 'gpt'",
        ),
        ({"conversations": [{"from": "human"}]}, Kind.MALFORMED, "turn 0 has no text in 'value'"),
        (turns("<image>\nq"), Kind.MALFORMED, "the conversation must end with an answer from 'gpt'"),
        (turns("<image>\nq", "a", " \n", "b"), Kind.MALFORMED, "the question of turn 2 is empty"),
        (turns("<image>\nq", " \n"), Kind.EMPTY_ANSWER, "turn 1"),
        (turns("<image>\nq", "<image>"), Kind.IMAGE_MARKER, "<image> in the answer of turn 1"),
        (turns("<image><image>\nq", "a"), Kind.IMAGE_MARKER, "2 <image> for 1 image"),
        ({"task_name": 7}, Kind.MALFORMED, "task_name must be a non-empty string, got 7"),
        ({"image": ["red.png"]}, Kind.MALFORMED, "image must be one relative path, got ['red.png']"),
        ({"image": ""}, Kind.MALFORMED, "image must be one relative path, got ''"),
        ({"image": "a\0b"}, Kind.MALFORMED, "image must be one relative path, got 'a\\x00b'"),
        ({"image": "green.png"}, Kind.MISSING_IMAGE, "green.png"),
        ({"image": "."}, Kind.MISSING_IMAGE, ". is not a file"),
    ],
)
def test_a_bad_record_says_what_is_wrong(make_raw, images, changes, kind, detail) -> None:
    assert kind_and_detail(make_raw(**changes), images) == (kind, detail)


def test_a_record_that_is_no_object(images) -> None:
    assert kind_and_detail("red", images) == (Kind.MALFORMED, "expected an object, got str")


def test_a_marker_without_image(make_raw, images) -> None:
    raw = make_raw(image=None, **turns("<image>\nq", "a"))
    assert kind_and_detail(raw, images) == (Kind.IMAGE_MARKER, "1 <image> for 0 image")


def test_paths_that_leave_the_image_folder(make_raw, images) -> None:
    secret = images.parent / "secret.png"
    secret.write_bytes(b"x")
    (images / "link.png").symlink_to(secret)
    (images / "up").symlink_to(images.parent)
    outside = f"leads to {secret}, outside {images}"
    for name in ("../secret.png", "link.png", "up/secret.png", "a/../../secret.png"):
        assert kind_and_detail(make_raw(image=name), images) == (Kind.ESCAPING_IMAGE, f"{name} {outside}")
    assert kind_and_detail(make_raw(image=str(images / "red.png")), images) == (
        Kind.ESCAPING_IMAGE,
        f"{images}{os.sep}red.png is absolute, expected a path relative to {images}",
    )


def test_paths_that_stay_inside(make_raw, images) -> None:
    (images / "alias.png").symlink_to(images / "red.png")
    (images / "sub").mkdir()
    for name in ("alias.png", "sub/../red.png", "./red.png"):
        assert parse_record(0, make_raw(image=name), images).image == images / name


def write(tmp_path, text: str):
    path = tmp_path / "train.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_json_list_and_json_lines_read_alike(tmp_path) -> None:
    rows = [{"id": 1}, {"id": 2, "text": "a\u2028b"}]
    as_list = read_annotations(write(tmp_path, "\ufeff" + json.dumps(rows, indent=1)))
    assert as_list == ([(0, rows[0]), (1, rows[1])], [])
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    assert read_annotations(write(tmp_path, lines)) == as_list


def test_a_list_that_breaks_off(tmp_path) -> None:
    path = write(tmp_path, '[\n{"id": 1},\n{"id": 2},\n{"id": "thr')
    detail = "Unterminated string starting at at line 4 column 8 (character 31 of 35), after 2 whole records"
    assert read_annotations(path) == ([(0, {"id": 1}), (1, {"id": 2})], [Problem(2, Kind.CUT_SHORT, detail)])


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (
            '[{"id": 1}',
            "Expecting ',' or ']' at line 1 column 11 (character 10 of 10), after 1 whole records",
        ),
        ('[{"id": 1}, ', "Expecting value at line 1 column 13 (character 12 of 12), after 1 whole records"),
        (
            '[{"id": 1}] x',
            "Text after the end of the list at line 1 column 11 (character 10 of 13), after 1 whole records",
        ),
        ("[", "Expecting value at line 1 column 2 (character 1 of 1), after 0 whole records"),
    ],
)
def test_other_breaks(tmp_path, text, detail) -> None:
    _, problems = read_annotations(write(tmp_path, text))
    assert [problem.detail for problem in problems] == [detail]


def test_a_broken_line_costs_that_line_alone(tmp_path) -> None:
    records, problems = read_annotations(write(tmp_path, '{"id": 1}\n{"id": \n{"id": 3}\n'))
    assert records == [(0, {"id": 1}), (2, {"id": 3})]
    assert problems == [Problem(1, Kind.MALFORMED, "line 2 is not JSON: Expecting value at column 8")]


@pytest.mark.parametrize("text", ["", "id,image\n1,a.png\n", '{\n "colour": {"definition": "x"}\n}', "3"])
def test_what_is_no_list_of_records(tmp_path, text) -> None:
    with pytest.raises(UserError, match=r"train\.json: expected a JSON list of records or JSON lines"):
        read_annotations(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        read_annotations(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_annotations(tmp_path)
    (tmp_path / "train.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="not UTF-8 text at byte 2"):
        read_annotations(tmp_path / "train.json")
