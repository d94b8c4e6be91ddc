"""Plain values -> frozen dataclasses, strictly: every key known, every value of the declared type.

Knows the annotations that `config/schema.py` uses: bool, int, float, str, `X | None`, Literal, list[X], dict
and nested dataclasses.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mixlora_cli.errors import UserError, cut

T = TypeVar("T")
_COMMANDS = ("train", "eval", "judge", "bench", "interference", "tsne")
"""Groups of keys that are named like the one command that reads them."""
_UNSET = "???"  # what OmegaConf writes for a mandatory value that nobody gave


def parse(config_class: type[T], values: Mapping[str, Any], at: str = "") -> T:
    """Build `config_class` from plain values.

    Args:
        config_class: A dataclass of `config/schema.py`.
        values: What YAML and the command line say.
        at: Dotted key of `values` in the whole configuration, for messages.

    Raises:
        UserError: An unknown key, a missing one, a wrong type, or a value that the dataclass refuses.
    """
    hints = _hints(config_class)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        key = _join(at, str(name))
        if name not in hints:
            raise UserError(unknown_key(key, value, all_keys(config_class, at)))
        if value == _UNSET:
            raise UserError(f"{key} is missing: give {key}=<{describe(hints[name])}>")
        arguments[str(name)] = convert(value, hints[name], key)
    for entry in fields(config_class):  # type: ignore[arg-type]  # a dataclass by contract
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and entry.name not in arguments:
            raise UserError(
                f"{_join(at, entry.name)} is missing: does your configuration start with "
                "`defaults: [train, _self_]` (or eval, align), and does each group option have its `name`?"
            )
    try:
        return config_class(**arguments)
    except ValueError as error:
        raise UserError(str(error)) from error


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type that `hint` declares; an integer may stand for a float or a text."""
    group = _group(hint)
    if group is not None and isinstance(value, Mapping):
        return parse(group, value, key)
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if _is(value, option):
            if get_origin(option) is list:
                (item,) = get_args(option)
                return [convert(entry, item, f"{key}[{index}]") for index, entry in enumerate(value)]
            return option(value) if option in (float, str) else value
    raise UserError(f"{key}={show(value)}: must be {describe(hint)}{_hint_for(value, hint)}")


def _is(value: Any, option: Any) -> bool:
    if option is bool or isinstance(value, bool):
        return option is bool and isinstance(value, bool)
    if option is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    if option is int:
        return isinstance(value, int)
    if option is str:
        return isinstance(value, (str, int))
    if get_origin(option) is Literal:
        return value in get_args(option)
    container = get_origin(option) or option
    return container in (list, dict) and isinstance(value, container)


def describe(hint: Any) -> str:
    """What a value of this type looks like, in words: 'an integer or null'."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return "a list like [a,b]"
    if is_dataclass(hint):
        return "a group of keys: " + ", ".join(entry.name for entry in fields(hint))
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}
    return words.get(hint, "a mapping like {key: value}")


def _hint_for(value: Any, hint: Any) -> str:
    if get_origin(hint) is Literal:
        return did_you_mean(str(value), map(str, get_args(hint)))
    if isinstance(value, (bool, float)) and str in (hint, *get_args(hint)):
        return "; quote it to make it one, e.g. 'key=\"1e5\"'"
    return ""


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
    allowed = f"; allowed here: {', '.join(level)}" if level else ""
    if parent in known and not level:
        return f"{key}={show(value)}: unknown key; {parent} is a value without keys of its own"
    meant = f"; did you mean {guess[0]}?" if guess else ""
    return f"{key}={show(value)}: unknown key{allowed}{meant}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known word nearest to `word`, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def hint_at(word: str, known: Iterable[str], what: str) -> str:
    """'did you mean X?' for the known word nearest to `word`, else the first twenty of 'known <what>: ...'."""
    names = sorted(known)
    near = did_you_mean(word, names).removeprefix("; ")
    return near or f"known {what}: {', '.join(map(cut, names[:20])) or 'none'}"


def all_keys(config_class: type, at: str = "") -> list[str]:
    """Every dotted key of a configuration class, groups before their members, below the dotted key `at`."""
    keys = []
    for name, hint in _hints(config_class).items():
        keys.append(_join(at, name))
        group = _group(hint)
        if group is not None:
            keys += all_keys(group, _join(at, name))
    return keys


def _group(hint: Any) -> type | None:
    """The dataclass that `hint` declares, alone or as `X | None`."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _hints(config_class: type) -> dict[str, Any]:
    return get_type_hints(config_class)


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name
