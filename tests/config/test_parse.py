"""Types are taken strictly; messages name the key, the value and what is allowed."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from mixlora_cli.config.parse import all_keys, convert, parse, unknown_key
from mixlora_cli.errors import UserError


@dataclass(frozen=True)
class Inner:
    size: int
    kind: Literal["round", "square"] = "round"

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"inner.size={self.size}: must be >= 0")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    ratio: float = 0.5
    name: str | None = None
    words: list[str] | None = None
    extra: dict[str, object] = field(default_factory=dict)
    loud: bool = False


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (1e-3, float, 1e-3),
        ("a", str, "a"),
        (2024, str, "2024"),
        (True, bool, True),
        (None, int | None, None),
        (7, int | None, 7),
        ("square", Literal["round", "square"], "square"),
        (["a", 1], list[str], ["a", "1"]),
        ({"a": {"b": 1}}, dict[str, object], {"a": {"b": 1}}),
    ],
)
def test_accepted(value: Any, hint: Any, expected: Any) -> None:
    result = convert(value, hint, "key")
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("four", int, "key=four: must be an integer"),
        (1.5, int, "key=1.5: must be an integer"),
        (True, int, "key=true: must be an integer"),
        (True, float, "key=true: must be a number"),
        (float("nan"), float, "key=nan: must be a number"),
        (float("inf"), float, "key=inf: must be a number"),
        ("1e-3", float, "key=1e-3: must be a number"),
        (1, bool, "key=1: must be true or false"),
        (None, int, "key=null: must be an integer"),
        ("", int | None, "key='': must be an integer or null"),
        ([1], int, "key=[1]: must be an integer"),
        ({"a": 1}, str, "key={a:1}: must be a text"),
        (
            1e5,
            str | None,
            "key=100000.0: must be a text or null; quote it to make it one, e.g. 'key=\"1e5\"'",
        ),
        (
            "sqare",
            Literal["round", "square"],
            "key=sqare: must be one of round, square; did you mean square?",
        ),
        ("a", list[str] | None, "key=a: must be a list like [a,b] or null"),
        ([["a"]], list[str], "key[0]=[a]: must be a text"),
        (3, Inner, "key=3: must be a group of keys: size, kind"),
    ],
)
def test_refused(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(value, hint, "key")
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
        ({"inner": {"size": "???"}}, "inner.size is missing: give inner.size=<an integer>"),
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


@dataclass(frozen=True)
class Optional:
    inner: Inner | None = None


def test_a_group_may_be_left_out() -> None:
    assert parse(Optional, {"inner": None}) == Optional(None)
    assert parse(Optional, {"inner": {"size": 3}}) == Optional(Inner(3))
    assert all_keys(Optional) == ["inner", "inner.size", "inner.kind"]
    with pytest.raises(
        UserError, match=r"inner\.colour=red: unknown key; allowed here: inner\.size, inner\.kind"
    ):
        parse(Optional, {"inner": {"size": 3, "colour": "red"}})
