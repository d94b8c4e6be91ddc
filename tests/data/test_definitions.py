"""The forms that task definitions come in, and what is said when some are missing."""

from __future__ import annotations

import json

import pytest

from mixlora_cli.data.definitions import definitions_of, parse_definitions
from mixlora_cli.errors import UserError

WANTED = {"GQA": "Answer the question.", "MNIST-M+number_recognition": "Name the digit."}


@pytest.mark.parametrize(
    "raw",
    [
        WANTED,
        {task: {"definition": text, "split": "seen"} for task, text in WANTED.items()},
        {task: {"description": text} for task, text in WANTED.items()},
        [{"task_name": task, "instruction": text} for task, text in WANTED.items()],
        # The definition repeated in each record of its task.
        [{"task_name": task, "id": n, "definition": text} for n in range(2) for task, text in WANTED.items()],
    ],
)
def test_every_form_gives_the_same_definitions(raw) -> None:
    assert parse_definitions(raw, "f.json") == WANTED


def test_a_definition_goes_before_a_description() -> None:
    assert parse_definitions({"a": {"description": "d", "definition": "x"}}, "f") == {"a": "x"}


def test_published_vision_flan_metadata_holds_records_and_is_refused_as_such() -> None:
    record = {
        "id": "1",
        "task_name": "GQA",
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "q"}],
    }
    with pytest.raises(UserError, match=r"got a list of 3 training records without any definition"):
        parse_definitions([record] * 3, "data.metadata=metadata.json")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (3, "f.json: expected an object of task names, got a int"),
        ([], "got a list"),
        ([{"definition": "x"}], "entry 0 names no task; expected one of task_name, task, name"),
        (["x"], "entry 0 names no task"),
        ([{"task": "a", "definition": "x"}, {"task": "b"}], "task b has no text in 'definition'"),
        ([{"task": "a", "definition": "x"}, {"task": "a", "definition": "y"}], "task a has two different"),
    ],
)
def test_other_forms_are_refused(raw, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_definitions(raw, "f.json")


def test_definitions_of_the_configured_data(make_data, tmp_path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps({"colour": "Say the colour.", "shape": "Say it."}))
    data = make_data([], metadata=str(tmp_path / "metadata.json"))
    assert definitions_of(data, ["colour"]) == {"colour": "Say the colour."}
    with pytest.raises(UserError, match=r"\(size\): add them to .*/metadata.json"):
        definitions_of(data, ["colour", "size"])
    with pytest.raises(UserError, match=r"\(colour\): give data.metadata=<file>"):
        definitions_of(make_data([]), ["colour"])
