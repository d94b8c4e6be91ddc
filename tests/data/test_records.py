from __future__ import annotations

import json
import os

import pytest

from mixlora_cli.data.problems import BadRecord, Kind, Problem
from mixlora_cli.data.records import Record, parse_record, read_annotations
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError

ONE_PATH = "image must be one relative path, got"
IN_RECORD = "...: the picture is in the record (base64); write it to a file and give its name"


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
        ({"image": "g" * 300}, Kind.MISSING_IMAGE, "g" * 77 + "..."),
        ({"image": {"bytes": "x" * 300}}, Kind.MALFORMED, f"{ONE_PATH} {{'bytes': '{'x' * 66}..."),
        (
            {"image": f"data:image/png;base64,{'A' * 300}"},
            Kind.MALFORMED,
            f"data:image/png;base64,{'A' * 55}{IN_RECORD}",
        ),
        ({"image": "A" * 5000}, Kind.MALFORMED, "A" * 77 + IN_RECORD),
        (
            {"task_name": ["x" * 300]},
            Kind.MALFORMED,
            f"task_name must be a non-empty string, got ['{'x' * 75}...",
        ),
        ({"images": ["red.png", "blue.png"]}, Kind.MALFORMED, "images has 2 pictures, a record may have one"),
        (
            {"images": ["blue.png"]},
            Kind.MALFORMED,
            "image and images name two pictures, a record may have one",
        ),
        (
            {"image": None, "images": "red.png"},
            Kind.MALFORMED,
            "images must be a list with one path, got 'red.png'",
        ),
        (
            {"image": None, "images": [None]},
            Kind.MALFORMED,
            "images must be a list with one path, got [None]",
        ),
        ({"image": None, "images": [{"path": "a"}]}, Kind.MALFORMED, f"{ONE_PATH} {{'path': 'a'}}"),
        (
            {"image": None, "image_path": "red.png"},
            Kind.MALFORMED,
            "no image, but image_path; the key is image",
        ),
        ({"image": None, "Image": "red.png"}, Kind.MALFORMED, "no image, but Image; the key is image"),
        (
            {"image": None, "img_paths": ["red.png"]},
            Kind.MALFORMED,
            "no image, but img_paths; the key is image",
        ),
        ({"image": None, "imageUrl": "http://a"}, Kind.MALFORMED, "no image, but imageUrl; the key is image"),
        (turns("<image>\nq", "nice \ud83d"), Kind.NOT_UNICODE, "lone surrogate U+D83D in conversations"),
        (turns("<image>\nq\udc00", "a"), Kind.NOT_UNICODE, "lone surrogate U+DC00 in conversations"),
        ({"image": "p\ud83d.png"}, Kind.NOT_UNICODE, "lone surrogate U+D83D in image"),
        ({"task_name": "\udfff"}, Kind.NOT_UNICODE, "lone surrogate U+DFFF in task_name"),
        ({"answers": [{"answer": "\ud800"}]}, Kind.NOT_UNICODE, "lone surrogate U+D800 in answers"),
        ({"\ud800": 1}, Kind.NOT_UNICODE, "lone surrogate U+D800 in \\ud800"),
        ({"image": "."}, Kind.MISSING_IMAGE, ". is not a file"),
    ],
)
def test_a_bad_record_says_what_is_wrong(make_raw, images, changes, kind, detail) -> None:
    assert kind_and_detail(make_raw(**changes), images) == (kind, detail)


@pytest.mark.parametrize(
    "answer",
    ["\u200b", "\ufeff", "\0", "\xa0", "\u2060\u200e\t", "\u3164", "\u2800", "\ufe0f", "\x7f\x1b", "\u2028"],
)
def test_an_answer_that_shows_nothing_is_empty(make_raw, images, answer) -> None:
    assert kind_and_detail(make_raw(**turns("<image>\nq", answer)), images) == (Kind.EMPTY_ANSWER, "turn 1")
    asked = make_raw(**turns("<image>\nq", "a", answer, "b"))
    assert kind_and_detail(asked, images) == (Kind.MALFORMED, "the question of turn 2 is empty")
    full = make_raw(**turns("<image>\nq", f"{answer}7{answer}"))
    assert parse_record(0, full, images).conversation[1].text == f"{answer}7{answer}"


@pytest.mark.parametrize("answer", ["?", "\u00e9", "\U0001f600", "\ue000", "\u0301", "-"])
def test_an_answer_that_shows_something_is_one(make_raw, images, answer) -> None:
    assert parse_record(0, make_raw(**turns("<image>\nq", answer)), images).conversation[1].text == answer


@pytest.mark.parametrize("image", [None, "red.png"])
def test_a_list_of_one_picture_is_that_picture(make_raw, images, image) -> None:
    record = parse_record(0, make_raw(image=image, images=["red.png"]), images)
    assert (record.image, record.extra) == (images / "red.png", {})


@pytest.mark.parametrize(
    "changes", [{"images": []}, {"images": None}, {"image_id": "7"}, {"image_path": None}, {"image_path": ""}]
)
def test_keys_that_name_no_picture_leave_a_text_only_record(images, changes) -> None:
    assert parse_record(0, turns("q", "a") | changes, images).image is None


def test_other_keys_beside_the_picture_are_kept(make_raw, images) -> None:
    record = parse_record(0, make_raw(image_path="x/red.png", Image="red"), images)
    assert (record.image, record.extra) == (images / "red.png", {"image_path": "x/red.png", "Image": "red"})


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
    (tmp_path / "train.json").write_bytes(b'\xef\xbb\xbf["\xff"]')
    with pytest.raises(UserError, match="not UTF-8 text at byte 5"):
        read_annotations(tmp_path / "train.json")


HUGE, DEEP = "9" * 5000, "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("value", "reason"),
    [(HUGE, "a number with thousands of digits"), (DEEP, "nested too deeply, thousands of brackets")],
)
def test_json_beyond_all_measure(tmp_path, value, reason) -> None:
    for text in (f'[{{"id": {value}}}]', f"[{value}]"):
        with pytest.raises(UserError, match=rf"train\.json: malformed JSON: {reason}") as caught:
            read_annotations(write(tmp_path, text))
        assert len(str(caught.value)) < 200 + len(str(tmp_path))
    records, problems = read_annotations(write(tmp_path, f'{{"id": 1}}\n{{"id": {value}}}\n{{"id": 3}}\n'))
    assert records == [(0, {"id": 1}), (2, {"id": 3})]
    assert [(problem.index, problem.kind) for problem in problems] == [(1, Kind.MALFORMED)]
    assert problems[0].detail.startswith(f"line 2: malformed JSON: {reason}")


def test_line_breaks_of_every_system_read_alike(tmp_path) -> None:
    (tmp_path / "train.json").write_bytes(b'{"id": 1}\r\n{"id": 2}\r{"id": 3}\n')
    records, problems = read_annotations(tmp_path / "train.json")
    assert (records, problems) == ([(0, {"id": 1}), (1, {"id": 2}), (2, {"id": 3})], [])
