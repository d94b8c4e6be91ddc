"""Typed settings: pydantic dataclasses, each mistake in which is one line that names key, value and what is allowed."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, StrictBool, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import dataclass_transform

from mixlora_cli.errors import UserError, did_you_mean

T = TypeVar("T")
_COMMANDS = ("train", "eval", "judge", "bench", "interference", "tsne")
"""Groups of keys that are named like the one command that reads them."""
_REFUSED = {
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "rule": "{allowed}",
}


def rule(allowed: str, holds: Callable[[Any], object]) -> AfterValidator:
    """What one value must be, in the words of the message and as a condition."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise PydanticCustomError("rule", "{allowed}", {"allowed": allowed})
        return value

    return AfterValidator(check)


# YAML has told numbers, texts and switches apart: nothing is turned into another, but an integer may stand for a number
# with a fraction, or for a text.
Flag = StrictBool
Integer = Annotated[int, Strict()]
Positive = Annotated[int, Strict(), Field(gt=0)]
NotNegative = Annotated[int, Strict(), Field(ge=0)]
Seed = Annotated[int, Strict(), rule("must be in [0, 2^32)", lambda seed: 0 <= seed < 2**32)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NotNegativeNumber = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, rule("must be in [0, 1)", lambda share: 0 <= share < 1)]
Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
AnyPrecision = Literal["auto", "fp32", "bf16"]


class _OneLine(type):
    """Makes construction raise ValueError with one line where pydantic would raise a list of errors."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise ValueError(one_line(error, cls, cls.at)) from None  # type: ignore[attr-defined]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Settings(metaclass=_OneLine):
    """A frozen pydantic dataclass that takes only keys it knows and values of their declared types.

    Its `__post_init__` checks what several values must be together. A class may say `at`: the dotted key of the group
    that it is, which messages name before its own keys.
    """

    at: ClassVar[str] = ""

    def __init_subclass__(cls, at: str = "") -> None:
        cls.at = at
        # Deferred: a command builds the validators of its own classes alone.
        dataclass(frozen=True, config=ConfigDict(extra="forbid", defer_build=True))(cls)


def require(condition: object, key: str, value: object, allowed: str) -> None:
    """Raise ValueError with one line unless `condition` holds; for `__post_init__`."""
    if not condition:
        raise ValueError(f"{key}={show(value)}: {allowed}")


def parse(config_class: type[T], values: Mapping[str, Any]) -> T:
    """Build a class of `Settings` from plain values, as YAML and the command line say them.

    Raises:
        UserError: An unknown key, a missing one, a wrong type, or a value that the class refuses.
    """
    try:
        return config_class(**{str(key): value for key, value in values.items()})
    except ValueError as error:
        raise UserError(str(error)) from error


def one_line(error: ValidationError, config_class: type, at: str = "") -> str:
    """The first mistake that pydantic found, in the words of the command line."""
    first: ErrorDetails = error.errors(include_url=False)[0]
    kind, value, loc = first["type"], first["input"], first["loc"]
    if kind == "value_error":  # __post_init__ has said it
        return str(first["ctx"]["error"])
    names = [entry.name for entry in fields(config_class)]
    path = [
        names[loc[0]] if isinstance(loc[0], int) else loc[0],
        *loc[1:],
    ]  # a positional argument has its place
    key = at
    for part in path:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    if kind == "unexpected_keyword_argument":
        return unknown_key(key, value, all_keys(config_class, at))
    hint = hint_of(config_class, path)
    if kind.startswith("missing"):
        return (
            f"{key} is missing: does your configuration start with `defaults: [train, _self_]` (or eval, align), "
            "and does each group option have its `name`?"
        )
    if kind in _REFUSED:
        allowed, options = _REFUSED[kind].format(**first["ctx"]), _options(hint)
        null = " or null" if type(None) in options and "null" not in allowed else ""
        return f"{key.partition('[')[0]}={show(value)}: {allowed}{null}"
    return f"{key}={show(value)}: must be {describe(hint)}{_advice(value, hint)}"


def hint_of(config_class: type, path: Sequence[str | int]) -> Any:
    """The declared type of the value at a path of keys and places in lists, without pydantic's additions."""
    hint: Any = config_class
    for part in path:
        group = _group(hint)
        if group is not None:
            hint = _hints(group)[str(part)]
        else:
            (container,) = (option for option in _options(hint) if get_origin(option) in (list, dict))
            hint = get_args(container)[-1]
    return hint


def describe(hint: Any) -> str:
    """What a value of this type looks like, in words: 'an integer or null'."""
    if len(_options(hint)) > 1:
        return " or ".join(map(describe, _options(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return "a list like [a,b]"
    if is_dataclass(hint):
        return "a group of keys: " + ", ".join(entry.name for entry in fields(hint))
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}
    return words.get(hint, "a mapping like {key: value}")


def show(value: Any) -> str:
    """A value as one would write it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{show(entry)}" for name, entry in value.items()) + "}"
    return str(value) if value != "" else "''"


def unknown_key(key: str, value: Any, known: Sequence[str]) -> str:
    """The message for a dotted key that is not one of the `known` ones."""
    if key in _COMMANDS and isinstance(value, Mapping):
        return f"{key}: unknown key; what sets it is meant for another command: mixlora {key} ..."
    parent = key.rpartition(".")[0]
    level = [name for name in known if name.rpartition(".")[0] == parent]
    same_last_part = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    elsewhere = [name for name in known if name != parent]
    guess = same_last_part[:1] or difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.7)
    if parent in known and not level:
        return f"{key}={show(value)}: unknown key; {parent} is a value without keys of its own"
    allowed = f"; allowed here: {', '.join(level)}" if level else ""
    meant = f"; did you mean {guess[0]}?" if guess else ""
    return f"{key}={show(value)}: unknown key{allowed}{meant}"


def all_keys(config_class: type, at: str = "") -> list[str]:
    """Every dotted key of a configuration class, groups before their members, below the dotted key `at`."""
    keys = []
    for name, hint in _hints(config_class).items():
        key = f"{at}.{name}" if at else name
        group = _group(hint)
        keys += [key] if group is None else [key, *all_keys(group, key)]
    return keys


def _hints(config_class: Any) -> dict[str, Any]:
    declared = get_type_hints(config_class)
    return {entry.name: declared[entry.name] for entry in fields(config_class)}


def _advice(value: Any, hint: Any) -> str:
    if get_origin(hint) is Literal:
        return did_you_mean(str(value), map(str, get_args(hint)))
    if isinstance(value, (bool, float)) and str in _options(hint):
        return "; quote it to make it one, e.g. 'key=\"1e5\"'"
    return ""


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _group(hint: Any) -> Any:
    """The class of settings that a type is, alone or as `X | None`; else None."""
    return next((option for option in _options(hint) if is_dataclass(option)), None)
