"""Hydra's and OmegaConf's own errors -> one line in our style: the key, the value, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from mixlora_cli.config.parse import all_keys, did_you_mean, unknown_key
from mixlora_cli.data.text_files import TOO_DEEP
from mixlora_cli.paths import conf_dir

CONFIG_ERRORS = (HydraException, OmegaConfBaseException, MarkedYAMLError)


def explain(error: Exception, overrides: Sequence[str], config_class: type) -> str:
    """One line that says what was wrong, what is allowed and what to do.

    Args:
        error: One of `CONFIG_ERRORS`, or what reading a file of the configuration raised.
        overrides: The `key=value` arguments of the command line.
        config_class: Dataclass of the command's configuration.
    """
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"{mark.name}, line {mark.line + 1}" if mark else "configuration"
        return f"{place}: not valid YAML, {error.problem}"
    if isinstance(error, UnicodeDecodeError):  # neither knows which of the files it was
        return f"a configuration file is not UTF-8 text at byte {error.start}; save it as UTF-8"
    if isinstance(error, RecursionError):
        return f"a configuration file is {TOO_DEEP}"
    text = str(error) or str(error.__cause__)
    if found := re.match(r"Could not override '(.+?)'", text):
        return _no_such_key(found[1], overrides, config_class)
    if found := re.match(r"Could not delete from config\. '(.+?)' does not exist", text):
        return f"~{found[1]}: there is no such key to delete"
    if found := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'", text):
        return (
            f"{found[1]}: several values need -m (--multirun), which runs one job for each; "
            "a list is written key=[a,b], a text with a comma 'key=\"a,b\"'"
        )
    if found := re.match(r"Additional config directory '(.+?)' not found", text):
        return f"--config-dir={found[1]}: must be an existing folder"
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _unreadable(override: str) -> str:
    if "=" not in override:
        return f"{override}: an override is written key=value (or group=option)"
    return (
        f"{override}: cannot be read as key=value; "
        "quote a value that has special characters or spaces, e.g. 'data.train=\"a (b).json\"'"
    )


def _missing_config(error: MissingConfigException) -> str:
    path = error.missing_cfg_file
    if path is None:
        return "--config-path: must be an existing folder with configuration files"
    group, _, option = path.rpartition("/")
    if error.options:
        known = ", ".join(sorted(error.options))
        if group.startswith("hydra/"):
            known += " (others come with plugins, e.g. hydra-joblib-launcher)"
        return f"{group}={option}: no such option; allowed: {known}{did_you_mean(option, error.options)}"
    where = re.match(r"In '(.+?)'", str(error))
    if where:
        return f"{where[1]}.yaml names {path} in its defaults list, which does not exist"
    return f"--config-name={path}: no such configuration in {conf_dir()}; add your own folder: -cd FOLDER"


def _no_such_key(key: str, overrides: Sequence[str], config_class: type) -> str:
    value = dict(text.partition("=")[::2] for text in overrides).get(key, "")
    if "/" in key or "@" in key:
        return f"{key}={value}: no such group; --help lists the groups and their options"
    known = all_keys(config_class)
    if key in known:
        group = key.split(".")[0]
        return f"{key}={value}: the chosen option of the group {group} does not use this key"
    return unknown_key(key, value, known)
