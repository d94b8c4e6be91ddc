"""Types are taken strictly; messages name the key, the value and what is allowed."""

from dataclasses import field
from types import new_class
from typing import Any, Literal

import pytest

from mixlora_cli.config.settings import (
    Flag,
    Integer,
    NotNegative,
    Number,
    PositiveNumber,
    Settings,
    Text,
    all_keys,
    parse,
    unknown_key,
)
from mixlora_cli.errors import UserError


class Inner(Settings, at="inner"):
    size: NotNegative
    kind: Literal["round", "square"] = "round"


class Outer(Settings):
    inner: Inner
    ratio: Number = 0.5
    name: Text | None = None
    words: list[Text] | None = None
    extra: dict[Text, object] = field(default_factory=dict)
    loud: Flag = False


def convert(value: Any, hint: Any) -> Any:
    """`value` as a key of that type takes it."""
    one: Any = new_class("One", (Settings,), {}, lambda body: body.update(__annotations__={"key": hint}))
    return parse(one, {"key": value}).key


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, Integer, 3),
        (3, Number, 3.0),
        (1e-3, Number, 1e-3),
        ("a", Text, "a"),
        (2024, Text, "2024"),
        (True, Flag, True),
        (None, Integer | None, None),
        (7, Integer | None, 7),
        ("square", Literal["round", "square"], "square"),
        (["a", 1], list[Text], ["a", "1"]),
        ({"a": {"b": 1}}, dict[Text, object], {"a": {"b": 1}}),
    ],
)
def test_accepted(value: Any, hint: Any, expected: Any) -> None:
    result = convert(value, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("four", Integer, "key=four: must be an integer"),
        (1.5, Integer, "key=1.5: must be an integer"),
        (True, Integer, "key=true: must be an integer"),
        (True, Number, "key=true: must be a number"),
        (float("nan"), Number, "key=nan: must be a number"),
        (float("inf"), Number, "key=inf: must be a number"),
        ("1e-3", Number, "key=1e-3: must be a number"),
        (1, Flag, "key=1: must be true or false"),
        (None, Integer, "key=null: must be an integer"),
        ("", Integer | None, "key='': must be an integer or null"),
        ([1], Integer, "key=[1]: must be an integer"),
        ({"a": 1}, Text, "key={a:1}: must be a text"),
        (
            1e5,
            Text | None,
            "key=100000.0: must be a text or null; quote it to make it one, e.g. 'key=\"1e5\"'",
        ),
        (
            "sqare",
            Literal["round", "square"],
            "key=sqare: must be one of round, square; did you mean square?",
        ),
        ("a", list[Text] | None, "key=a: must be a list like [a,b] or null"),
        ([["a"]], list[Text], "key[0]=[a]: must be a text"),
        (3, Inner, "key=3: must be a group of keys: size, kind"),
        (0, PositiveNumber | None, "key=0: must be > 0 or null"),
    ],
)
def test_refused(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(value, hint)
    assert str(caught.value) == message


def test_nested_values_become_nested_dataclasses() -> None:
    assert parse(Outer, {"inner": {"size": 3}, "ratio": 1, "words": ["x"]}) == Outer(
        Inner(3), 1.0, None, ["x"]
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "inner is missing: does your configuration start with `defaults: [train, _self_]` (or eval, align), "
             "and does each group option have its `name`?"),
        ({"inner": {"size": 1, "knd": "round"}},
         "inner.knd=round: unknown key; allowed here: inner.size, inner.kind; did you mean inner.kind?"),
        ({"inner": {"size": -1}}, "inner.size=-1: must be >= 0"),
        ({"inner": {"size": 1}, "size": 2},
         "size=2: unknown key; allowed here: inner, ratio, name, words, extra, loud; did you mean inner.size?"),
    ],
)  # fmt: skip
def test_mistakes_are_named_by_their_dotted_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Outer, values)
    assert str(caught.value) == message


def test_keys_are_listed_with_their_groups() -> None:
    assert all_keys(Outer) == ["inner", "inner.size", "inner.kind", "ratio", "name", "words", "extra", "loud"]


def test_no_guess_where_nothing_is_near() -> None:
    assert unknown_key("zzz", "1", ["rank", "seed"]) == "zzz=1: unknown key; allowed here: rank, seed"


class Optional(Settings):
    inner: Inner | None = None


def test_a_group_may_be_left_out() -> None:
    assert parse(Optional, {"inner": None}) == Optional(None)
    assert parse(Optional, {"inner": {"size": 3}}) == Optional(Inner(3))
    assert all_keys(Optional) == ["inner", "inner.size", "inner.kind"]
    with pytest.raises(
        UserError, match=r"inner\.colour=red: unknown key; allowed here: inner\.size, inner\.kind"
    ):
        parse(Optional, {"inner": {"size": 3, "colour": "red"}})
