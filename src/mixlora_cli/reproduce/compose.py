"""Overrides -> the configuration that `mixlora train` or `mixlora eval` would get, without running it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from mixlora_cli.config import DataConfig, ModelConfig, load
from mixlora_cli.data.mini.build import generator_digest
from mixlora_cli.errors import UserError
from mixlora_cli.hydra_app import CONFIG_ERRORS, explain
from mixlora_cli.hydra_conf import register
from mixlora_cli.paths import conf_dir, stage_one_digest

T = TypeVar("T")


def composed(root: str, config_class: type[T], overrides: Sequence[str]) -> T:
    """What the command `root` would run with.

    Raises:
        UserError: the overrides do not compose, or the command would refuse them.
    """
    found = _composed(root, config_class, tuple(overrides))  # type: ignore[arg-type]  # a class is hashable
    return cast(T, found)


@cache
def _composed(root: str, config_class: type, overrides: tuple[str, ...]) -> Any:
    """A grid asks for the same evaluation in every cell, and each composing takes Hydra a quarter of a second."""
    return load(config_class, _tree(root, config_class, overrides))


def sweep_of(root: str, config_class: type, overrides: Sequence[str], key: str) -> list[str]:
    """Values that an experiment's file gives `key` for `-m` to go through: `[["a"], ["b"]]` as "[a]", "[b]"."""
    tree = _tree(root, config_class, overrides, with_hydra=True)
    params: Any = OmegaConf.select(tree, "hydra.sweeper.params")
    return [value.strip() for value in str(params[key]).split(",")]


def _tree(root: str, config_class: type, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    register()
    try:
        with _hydra_set_aside(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose(root, list(overrides), return_hydra_config=with_hydra)
    except CONFIG_ERRORS as error:
        raise UserError(explain(error, overrides, config_class)) from error


@contextmanager
def _hydra_set_aside() -> Iterator[None]:
    """Hydra composes for one application at a time, and `mixlora reproduce` is one itself."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running


def versions(data: DataConfig, model: ModelConfig) -> dict[str, str]:
    """What decides a result beside the configuration: the built-in data's generator, the built-in base's weights."""
    return {
        "data version": generator_digest() if data.source == "mini" else data.source,
        "base version": stage_one_digest() if model.source == "mini" else model.source,
    }
