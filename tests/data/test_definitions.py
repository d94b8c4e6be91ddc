"""The forms that task definitions come in, and what is said when some are missing."""

from __future__ import annotations

import json

import pytest

from mixlora_cli.data.definitions import definitions_of, load_definitions, made_definitions, parse_definitions
from mixlora_cli.data.records import parse_record
from mixlora_cli.errors import UserError

WANTED = {"GQA": "Answer the question.", "MNIST-M+number_recognition": "Name the digit."}


@pytest.mark.parametrize(
    "raw",
    [
        WANTED,
        {task: {"definition": text, "split": "seen"} for task, text in WANTED.items()},
        {task: {"description": text} for task, text in WANTED.items()},
        {task: {"description": "d", "definition": text} for task, text in WANTED.items()},
        [{"task_name": task, "instruction": text} for task, text in WANTED.items()],
        # The definition repeated in each record of its task.
        [{"task_name": task, "id": n, "definition": text} for n in range(2) for task, text in WANTED.items()],
    ],
)
def test_every_form_gives_the_same_definitions(raw) -> None:
    assert parse_definitions(raw, "f.json") == WANTED


PUBLISHED = {"id": "1", "task_name": "GQA", "image": "a.jpg", "conversations": []}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (3, "f.json: expected an object of task names, got a int"),
        ([], "got a list"),
        ([PUBLISHED] * 3, "got a list of 3 training records without any definition"),
        ([{"definition": "x"}], "entry 0 names no task; expected one of task_name, task, name"),
        (["x"], "entry 0 names no task"),
        ([{"task": "a", "definition": "x"}, {"task": "b"}], "task b has no text in 'definition'"),
        ([{"task": "a", "definition": "x"}, {"task": "a", "definition": "y"}], "task a has two different"),
        ({"colour": {"definition": " "}}, "task colour has no text in 'definition'"),
        ({"colour": 3}, "task colour has no text in 'definition'"),
        ({"x" * 300: 3}, rf": task {'x' * 77}\.\.\. has no text"),
    ],
)
def test_other_forms_are_refused(raw, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_definitions(raw, "f.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b'{"colour": "caf\xe9"}', "not UTF-8 text at byte 15; expected a JSON file of task definitions"),
        ('{"colour": "é"}'.encode("utf-16"), "not UTF-8 text at byte 0"),
        (b'{"colour": "\\ud83d"}', r"text that is no Unicode: lone surrogate U\+D83D"),
        (b'{"colour": ' + b"9" * 5000 + b"}", "malformed JSON: a number with thousands of digits"),
        (b"[" * 100_000, "malformed JSON: nested too deeply"),
    ],
)
def test_definitions_are_read_by_the_rule_of_records(make_data, tmp_path, content, message) -> None:
    file = tmp_path / "metadata.json"
    data = make_data([], metadata=str(file))
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_definitions(data)
    assert str(caught.value).startswith(f"data.metadata={file}: ")
    assert "\n" not in str(caught.value)
    file.write_bytes(b"\xef\xbb\xbf" + '{"colour": "é"}'.encode())
    assert load_definitions(data) == {"colour": "é"}


def test_definitions_of_the_data_s_tasks(make_data, tmp_path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps({"colour": "Say the colour.", "shape": "Say it."}))
    data = make_data([], metadata=str(tmp_path / "metadata.json"))
    assert definitions_of(data, ["colour", "colour"]) == {"colour": "Say the colour."}
    with pytest.raises(
        UserError, match=r"1 of 2 tasks have none \(size\): add them to .*/metadata.json, by the"
    ):
        definitions_of(data, ["colour", "size", "colour"])
    assert load_definitions(make_data([])) == {}
    with pytest.raises(UserError, match=r"\(t0, t1, t2, t3, t4 and 2 more\): give data.metadata=<file>"):
        definitions_of(make_data([]), [f"t{n}" for n in range(7)])


def test_definitions_that_are_made_of_names_and_questions() -> None:
    system = {"role": "system", "content": "Be brief."}
    asked = ["Read  it\n", "Read it", "x" * 400, "a fourth one"]
    raws = [
        {"messages": [system, {"role": "user", "content": text}, {"role": "assistant", "content": "a"}]}
        for text in asked
    ]
    records = [parse_record(number, raw, None, task="read_a_page") for number, raw in enumerate(raws)]
    records.append(parse_record(9, {"question": "q", "answer": "a", "task_name": "b"}, None))
    expected = {"read_a_page": f"read a page\nRead it\n{'x' * 300}", "b": "b\nq"}
    assert made_definitions(records) == expected


def test_a_picture_is_no_part_of_a_made_definition(images) -> None:
    raw = {"image": "red.png", "question": "<image>\nWhich colour?", "answer": "a"}
    assert made_definitions([parse_record(0, raw, images, task="colour")]) == {
        "colour": "colour\nWhich colour?"
    }
