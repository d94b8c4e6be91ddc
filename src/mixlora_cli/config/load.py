"""Hydra's `DictConfig` -> the classes of settings, once and strictly; paths must exist.

Nothing heavy is imported here, so that a mistake is answered before any model library loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixlora_cli.config.settings import all_keys, describe, hint_of, parse
from mixlora_cli.data.template import SMOLLM, TEMPLATES
from mixlora_cli.errors import UserError, did_you_mean

T = TypeVar("T")

_FIXED: dict[str, dict[str, str]] = {
    "mini": {"model.template": SMOLLM.name, "model.attn_implementation": "eager"},
    "tiny": {"model.attn_implementation": "eager"},
}
"""What a built-in model has once and for all: another value would be stored and not used."""

_FILES = ("data.train", "data.heldout", "data.unseen", "data.metadata")
_FOLDERS = ("data.images", "run", "resume")
_CHECKPOINTS = ("model.name_or_path", "routing.encoder")  # Hugging Face ids or folders


def load(config_class: type[T], config: DictConfig | Mapping[str, Any]) -> T:
    """Parse a composed configuration and check what it points to.

    Args:
        config_class: `TrainConfig`, `EvalConfig` or `AlignConfig`.
        config: Composed by Hydra, or plain values such as those of a saved run.

    Raises:
        UserError: A key, a value, a file or a folder is wrong; one line says which and what is allowed.
    """
    tree = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    values = _plain(tree)
    for key in sorted(OmegaConf.missing_keys(tree) & set(all_keys(config_class))):
        raise UserError(f"{key} is missing: give {key}=<{describe(hint_of(config_class, key.split('.')))}>")
    _expand_home(values)
    settings = parse(config_class, values)
    _check_template(values)
    _check_paths(values)
    return settings


def _plain(tree: DictConfig) -> dict[str, Any]:
    """Nested dictionaries with every interpolation resolved."""
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'configuration'}: {str(error.msg).splitlines()[0]}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _expand_home(values: dict[str, Any]) -> None:
    """`~` in the values that are paths; the shell leaves it alone behind `key=`."""
    for key in (*_FILES, *_FOLDERS, "output_dir", *_CHECKPOINTS):
        parent, _, name = key.rpartition(".")
        level = values.get(parent) if parent else values
        if isinstance(level, dict) and isinstance(level.get(name), str) and level[name].startswith("~"):
            level[name] = str(Path(level[name]).expanduser())


def _get(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    return values


def _check_template(values: Mapping[str, Any]) -> None:
    name = _get(values, "model.template")
    if name is not None and name not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise UserError(f"model.template={name}: must be one of {known}{did_you_mean(str(name), TEMPLATES)}")
    source = _get(values, "model.source")
    for key, fixed in _FIXED.get(source, {}).items():
        value = _get(values, key)
        if value is not None and value != fixed:
            what = f"the {key.removeprefix('model.')} {fixed}"
            raise UserError(f"{key}={value}: model={source} has {what}; leave it away, or take another model")


def _check_paths(values: Mapping[str, Any]) -> None:
    for key in _FILES:
        path = _get(values, key)
        if path is not None and not Path(str(path)).is_file():
            raise UserError(f"{key}={path}: must be an existing file{_seen_from(path)}")
    for key in _FOLDERS:
        path = _get(values, key)
        if path is not None and not (key == "resume" and path == "auto") and not Path(str(path)).is_dir():
            raise UserError(f"{key}={path}: must be an existing folder{_seen_from(path)}")
    for key in _CHECKPOINTS:
        checkpoint = _get(values, key)
        if checkpoint is not None and _looks_like_path(str(checkpoint)):
            _check_checkpoint(key, str(checkpoint))
    output = Path(str(_get(values, "output_dir")))
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir={output}: must be a folder, or a name that is free; this is a file")


def _seen_from(path: object) -> str:
    """Where a relative path was looked for, and which part of it is there."""
    place = Path(str(path))
    if place.exists():
        return "; this is a folder" if place.is_dir() else "; this is a file"
    return "" if place.is_absolute() else f"; looked in {Path.cwd()}"


def _looks_like_path(name: str) -> bool:
    """Hub ids are `name` or `owner/name`; anything else with a slash, or an existing folder, is a path."""
    return name.startswith((".", "/")) or name.count("/") > 1 or Path(name).exists()


def _check_checkpoint(key: str, folder: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{key}={folder}: must be a Hugging Face id or an existing folder with a config.json")
