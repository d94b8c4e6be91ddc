"""Typed settings: pydantic dataclasses, each mistake in which is one line that names key, value and what is allowed."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from typing_extensions import dataclass_transform

from mixlora_cli.data.sources import place_of
from mixlora_cli.data.template import SMOLLM
from mixlora_cli.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

T = TypeVar("T")
_COMMANDS = ("train", "eval", "judge", "bench", "interference", "tsne")
"""Groups of keys that are named like the one command that reads them."""
_ALLOWED = {
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "rule": "{allowed}",
    "path": "{allowed}",
}
"""By pydantic's type of an error: what the message says is allowed."""
_FIXED: dict[Any, dict[str, str]] = {
    "mini": {"chat_template": SMOLLM.name, "attn_implementation": "eager"},
    "tiny": {"attn_implementation": "eager"},
}
"""What a built-in model has once and for all: another value would be stored and not used."""


def rule(allowed: str, holds: Callable[[Any], object]) -> AfterValidator:
    """What one value must be, in the words of the message and as a condition."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise PydanticCustomError("rule", "{allowed}", {"allowed": allowed})
        return value

    check.__doc__ = allowed  # `permitted` says it
    return AfterValidator(check)


def _path(kind: str, fault: Callable[[str], str]) -> AfterValidator:
    """`~` is expanded, because the shell leaves it alone behind `key=`; `load` alone looks what is there."""

    def check(path: str, info: ValidationInfo) -> str:
        path = str(Path(path).expanduser()) if path.startswith("~") else path
        if info.context and (allowed := fault(path)):
            raise PydanticCustomError("path", "{allowed}", {"allowed": allowed})
        return path

    check.__doc__ = kind
    return AfterValidator(check)


def _existing(kind: str, path: str) -> str:
    place = Path(path)
    if place.is_file() if kind == "file" else place.is_dir():
        return ""
    if place.exists():
        return f"must be an existing {kind}; this is a {'folder' if kind == 'file' else 'file'}"
    return f"must be an existing {kind}{'' if place.is_absolute() else f'; looked in {Path.cwd()}'}"


def _records_fault(name: str) -> str:
    place = place_of(name)
    return "" if place.on_hub or place.is_records_folder else _existing("file", place.name)


def _mixture(value: Any, info: ValidationInfo) -> Any:
    """A place of records, or {task: place}, where a place may be {file: place, weight: number}."""

    def refuse(allowed: str) -> PydanticCustomError:
        return PydanticCustomError("path", "{allowed}", {"allowed": allowed})

    def checked(place: Any, task: str = "") -> str:
        where = f"{task}: " if task else ""
        if not isinstance(place, str) or not place:
            raise refuse(
                f"{where}must be a file, or a mapping like {{task: file}} or {{task: {{file: a.json, weight: 2.0}}}}"
            )
        path = str(Path(place).expanduser()) if place.startswith("~") else str(place)
        if info.context and (allowed := _records_fault(path)):
            raise refuse(f"{where}{allowed}")
        return path

    if not isinstance(value, Mapping):
        return checked(value)
    if not value:
        raise refuse("must name at least one file")
    result: dict[str, Any] = {}
    for task, entry in value.items():
        if not isinstance(entry, Mapping):
            result[str(task)] = checked(entry, str(task))
            continue
        weight = entry.get("weight", 1.0)
        if type(weight) not in (int, float) or not 0 < weight < 1000 or set(entry) - {"file", "weight"}:
            raise refuse(f"{task}: must be a file or {{file: a.json, weight: 2.0}}, the weight in (0, 1000)")
        result[str(task)] = {"file": checked(entry.get("file"), str(task)), "weight": float(weight)}
    return result


def _several(kind: str) -> Callable[[Any, ValidationInfo], list[str]]:
    """One path or a list of them, as a list."""

    def check(value: Any, info: ValidationInfo) -> list[str]:
        given = [] if value is None else value if isinstance(value, list) else [value]
        for path in given:
            if not isinstance(path, str) or not path:
                raise PydanticCustomError(
                    "path", "{allowed}", {"allowed": f"must be a {kind}, or a list like [a,b]"}
                )
        paths = [str(Path(path).expanduser()) if path.startswith("~") else path for path in given]
        for path in paths:
            if info.context and (allowed := _existing(kind, path)):
                which = f"{path}: " if len(paths) > 1 else ""
                raise PydanticCustomError("path", "{allowed}", {"allowed": which + allowed})
        return paths

    check.__doc__ = f"a {kind}, or a list like [a,b]"
    return check


def _checkpoint_fault(name: str) -> str:
    """Hub ids are `name` or `owner/name`; anything else with a slash, or an existing folder, is a path."""
    is_path = name.startswith((".", "/")) or name.count("/") > 1 or Path(name).exists()
    if is_path and not (Path(name) / "config.json").is_file():
        return "must be a Hugging Face id or a folder with the config.json of a vision-language or language model"
    return ""


def _output_fault(path: str) -> str:
    taken = Path(path).exists() and not Path(path).is_dir()  # also a device or a pipe
    return "must be a folder, or a name that is free; this is a file" if taken else ""


# YAML has told numbers, texts and switches apart: nothing is turned into another, but an integer may stand for a number
# with a fraction, or for a text.
Flag = StrictBool
Integer = Annotated[int, Strict()]
Positive = Annotated[Integer, Field(gt=0)]
NotNegative = Annotated[Integer, Field(ge=0)]
Seed = Annotated[Integer, rule("must be in [0, 2^32)", lambda seed: 0 <= seed < 2**32)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NotNegativeNumber = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, rule("must be in [0, 1)", lambda share: 0 <= share < 1)]
Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
File = Annotated[Text, _path("an existing file", lambda path: _existing("file", path))]
Mixture = Annotated[Any, AfterValidator(_mixture)]
"""A `File` of records, a folder of them, a data set of the hub, or several of these by task."""
Folder = Annotated[Text, _path("an existing folder", lambda path: _existing("folder", path))]
Files = Annotated[Any, AfterValidator(_several("file"))]
"""A `list[str]`: no, one or several files."""
Folders = Annotated[Any, AfterValidator(_several("folder"))]
Resume = Annotated[
    Text,
    _path("auto, or an existing folder", lambda path: "" if path == "auto" else _existing("folder", path)),
]
OutputFolder = Annotated[Text, _path("a folder, or a name that is free", _output_fault)]
Checkpoint = Annotated[Text, _path("a Hugging Face id, or a folder with a config.json", _checkpoint_fault)]
AnyPrecision = Literal["auto", "fp32", "bf16"]


class _OneLine(type):
    """Makes construction raise ValueError with one line where pydantic would raise a list of errors."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise ValueError(_one_line(error, cls)) from None


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

    def require(self, condition: object, key: str, allowed: str) -> None:
        """Raise ValueError with one line unless `condition` holds, about the value of a key of this class or below."""
        if not condition:
            value = reduce(getattr, key.split("."), self)
            shown = getattr(value, "name", value) if is_dataclass(value) else value
            raise ValueError(f"{_join(self.at, key)}={show(shown)}: {allowed}")


def parse(config_class: type[T], values: Mapping[Any, Any], with_paths: bool = False) -> T:
    """Build a class of `Settings` from plain values, as YAML and the command line say them.

    Raises:
        UserError: An unknown key, a missing one, a wrong type, or a value that the class refuses; `with_paths`: a path
            where nothing of its kind is.
    """
    try:
        plain = {str(key): value for key, value in values.items()}
        return TypeAdapter(config_class).validate_python(plain, context=with_paths)
    except ValidationError as error:
        raise UserError(_one_line(error, config_class)) from error


def load(config_class: type[T], config: DictConfig | Mapping[str, Any]) -> T:
    """Parse a composed configuration and check what it points to.

    Args:
        config_class: A command's class of `config.commands`.
        config: Composed by Hydra, or plain values such as those of a saved run.

    Raises:
        UserError: A key, a value, a file or a folder is wrong; one line says which and what is allowed.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    try:
        values: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'configuration'}: {str(error.msg).splitlines()[0]}") from error
    for key in sorted(OmegaConf.missing_keys(tree) & set(all_keys(config_class))):
        raise UserError(f"{key} is missing: give {key}=<{describe(hint_of(config_class, key.split('.')))}>")
    settings = parse(config_class, values, with_paths=True)
    _check_model(values.get("model") or {})
    return settings


def _check_model(model: Mapping[str, Any]) -> None:
    for key, fixed in _FIXED.get(model.get("source"), {}).items():
        if model.get(key, fixed) not in (fixed, None):
            raise UserError(
                f"model.{key}={model[key]}: model={model['source']} has the {key} {fixed}; "
                "leave it away, or take another model"
            )


def _one_line(error: ValidationError, config_class: Any) -> str:
    """The first mistake that pydantic found, in the words of the command line."""
    first = error.errors(include_url=False)[0]
    kind, value, path = first["type"], first["input"], list(first["loc"])
    if kind == "value_error":  # `__post_init__` has said all of it
        return str(first["ctx"]["error"])
    if kind == "invalid_key":
        path = list(map(str, path))
    elif isinstance(path[0], int):  # an argument by position
        path[0] = fields(config_class)[path[0]].name
    key = config_class.at
    for part in path:
        key = f"{key}[{part}]" if isinstance(part, int) else _join(key, part)
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        return unknown_key(key, value, all_keys(config_class, config_class.at))
    if kind == "missing":
        return (
            f"{key} is missing: does your configuration start with `defaults: [train, _self_]` (or eval, align), "
            "and does each group option have its `name`?"
        )
    hint = hint_of(config_class, path)
    if kind in _ALLOWED:
        allowed = _ALLOWED[kind].format(**first["ctx"])
        nullable = type(None) in _options(hint) and kind != "path" and "null" not in allowed
        null = " or null" if nullable else ""
        return f"{key.partition('[')[0]}={show(value)}: {allowed}{null}"
    return f"{key}={show(value)}: must be {describe(hint)}{_advice(value, hint)}"


def hint_of(config_class: Any, path: Sequence[str | int]) -> Any:
    """The declared type of the value at a path of keys and places in lists, without pydantic's additions."""
    hint = config_class
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


def permitted(config_class: Any, key: str) -> str:
    """What the value of a dotted key may be, in words, with what pydantic's additions ask of it: 'a number > 0'."""
    *groups, name = key.split(".")
    owner = _group(hint_of(config_class, groups))
    return _permitted(get_type_hints(owner, include_extras=True)[name])


def _permitted(hint: Any) -> str:
    if len(options := _options(hint)) > 1:
        return ", or ".join(map(_permitted, options))
    if get_origin(hint) is list:
        return f"a list, each entry {_permitted(get_args(hint)[0])}"
    if get_origin(hint) is not Annotated:
        return describe(hint)
    plain, *additions = get_args(hint)
    limits = [
        _ALLOWED[name].format(**{short: getattr(limit, short)}).removeprefix("must be ")
        for addition in additions
        for limit in getattr(addition, "metadata", ())
        for name, short in (("greater_than", "gt"), ("greater_than_equal", "ge"))
        if hasattr(limit, short)
    ]
    rules = [addition.func.__doc__ for addition in additions if isinstance(addition, AfterValidator)]
    rules = [" ".join(words.split()).removeprefix("must be ").rstrip(".") for words in rules if words]
    words = " ".join([*([] if plain is Any else [_permitted(plain)]), *limits])
    return ": ".join(filter(None, [words, *rules])).replace(": in ", " in ").replace(": from ", " from ")


def _advice(value: Any, hint: Any) -> str:
    if get_origin(hint) is Literal:
        return did_you_mean(str(value), map(str, get_args(hint)))
    if isinstance(value, (bool, float)) and str in _options(hint):
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
    if parent in known and not level:
        return f"{key}={show(value)}: unknown key; {parent} is a value without keys of its own"
    allowed = f"; allowed here: {', '.join(level)}" if level else ""
    meant = f"; did you mean {guess[0]}?" if guess else ""
    return f"{key}={show(value)}: unknown key{allowed}{meant}"


def all_keys(config_class: Any, at: str = "") -> list[str]:
    """Every dotted key of a class of `Settings`, groups before their members, below the dotted key `at`."""
    keys = []
    for name, hint in _hints(config_class).items():
        group = _group(hint)
        keys += [_join(at, name), *(all_keys(group, _join(at, name)) if group else ())]
    return keys


def _hints(config_class: Any) -> dict[str, Any]:
    declared = get_type_hints(config_class)
    return {entry.name: declared[entry.name] for entry in fields(config_class)}


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _group(hint: Any) -> Any:
    """The class of settings that a type is, alone or as `X | None`; else None."""
    return next((option for option in _options(hint) if is_dataclass(option)), None)


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key
