"""Run a command through Hydra: overrides, sweeps, `--cfg`, `--help`; a user's mistake is one line, exit code 2."""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir, version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import MarkedYAMLError

from mixlora_cli.commands import Command
from mixlora_cli.data.text_files import TOO_DEEP
from mixlora_cli.errors import (
    FAILURE,
    INTERRUPTED,
    USER_MISTAKE,
    UserError,
    WorkerFailed,
    did_you_mean,
    report,
)
from mixlora_cli.hydra_conf import register
from mixlora_cli.launch import cluster_environment
from mixlora_cli.output import one_line_errors
from mixlora_cli.paths import conf_dir

CONFIG_ERRORS = (HydraException, OmegaConfBaseException, MarkedYAMLError)
_RAISES = "HYDRA_FULL_ERROR"
"""Hydra prints its errors and exits with 1, unless this variable asks for the exceptions themselves."""
Job = Callable[[DictConfig], Any]
T = TypeVar("T")


def run_command(command: Command, arguments: Sequence[str]) -> int:
    """Run `mixlora <command> <arguments>` and return its exit code: 0, 1 (a worker failed), 2 (a user's mistake), 130.

    Errors that are not the user's propagate with their traceback.
    """
    before = sys.argv
    sys.argv = [f"mixlora {command.name}", *arguments]  # what versions.json keeps
    try:
        parsed = _parse_arguments(arguments)
        own = parsed.config_name or parsed.config_dir or parsed.config_path
        lists = parsed.info or parsed.hydra_help or parsed.shell_completion
        named = any("experiment" in override for override in parsed.overrides)
        register(command.name, experiments=bool(own or lists or named))
        stops_early = parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion
        if not stops_early and (parsed.multirun or "hydra.mode=MULTIRUN" in parsed.overrides):
            _check_sweep(command, parsed)
        return _run_jobs(command, parsed)
    except UserError as error:
        report(error)
        return USER_MISTAKE
    except WorkerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        sys.argv = before


def _parse_arguments(arguments: Sequence[str]) -> Namespace:
    """Hydra's own flags and overrides.

    Raises:
        UserError: Unknown flag, or a flag without its value (argparse would print its whole usage).
    """
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            parsed = get_args_parser().parse_intermixed_args(list(arguments))
    except SystemExit as stop:
        if not stop.code:
            raise
        reason = printed.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"{reason}; --help lists the flags") from None
    if parsed.config_dir is not None and not Path(parsed.config_dir).is_dir():
        raise UserError(f"--config-dir={Path(parsed.config_dir).absolute()}: must be an existing folder")
    return parsed


def _settings(command: Command, config: DictConfig) -> Any:
    from mixlora_cli.config import load  # pydantic is not needed to print a configuration

    register(command.name, experiments=False)  # a launcher may have begun the job in another process
    return load(_config_class(command), config)


def _config_class(command: Command) -> Any:
    return getattr(importlib.import_module("mixlora_cli.config"), command.config)


def _check_sweep(command: Command, parsed: Namespace) -> None:
    """Compose and parse every job of a sweep before the first one starts.

    Sweepers from plugins choose their jobs as results come in: theirs are checked one by one as they start.

    Raises:
        UserError: The first job that cannot run, or two jobs that would write to the same folder.
    """
    if any(override.lstrip("+").startswith("hydra/sweeper=") for override in parsed.overrides):
        return
    mistakes: list[UserError] = []
    job_of_folder: dict[str, str] = {}

    def check(config: DictConfig) -> None:
        try:
            folder = _settings(command, config).output_dir
            if folder in job_of_folder:
                raise UserError(
                    f"output_dir={folder}: {job_of_folder[folder]} writes there too; "
                    "name what differs in it, e.g. 'output_dir=runs/lr-${train.learning_rate}'"
                )
            job_of_folder[folder] = _job_prefix().rstrip(": ")
        except UserError as error:
            mistakes.append(UserError(_job_prefix() + str(error)))

    with tempfile.TemporaryDirectory() as scratch:
        quietly = [f"hydra.sweep.dir='{scratch}'", "hydra/launcher=basic", "hydra.hydra_logging.root=null"]
        launchers = ("hydra/launcher=", "hydra.launcher.")
        kept = [text for text in parsed.overrides if not text.lstrip("+").startswith(launchers)]
        _call_hydra(command, check, Namespace(**{**vars(parsed), "overrides": [*kept, *quietly]}))
    if mistakes:
        raise mistakes[0]


def _run_jobs(command: Command, parsed: Namespace) -> int:
    """Hydra's run or sweep; in a sweep, one job's mistake does not keep the others from running."""
    mistakes: list[UserError] = []

    def job(config: DictConfig) -> Any:
        # Others may run this job, too: then a failed one is not left for the next, in which they may not be yet.
        one_of_several = cluster_environment(os.environ) is not None
        try:
            settings = _settings(command, config)
            folder = getattr(settings, "output_dir", None)
            with one_line_errors(None if folder is None else Path(folder)):
                module, _, function = command.entry.partition(":")
                return getattr(importlib.import_module(module), function)(settings)
        except UserError as error:
            if not _in_this_process():
                raise
            mistakes.append(error)
            report(error, _job_prefix())
            if one_of_several:
                raise SystemExit(USER_MISTAKE) from None
            return None
        except Exception:
            if not one_of_several:
                raise
            traceback.print_exc()
            raise SystemExit(FAILURE) from None

    _call_hydra(command, job, parsed)
    return USER_MISTAKE if mistakes else 0


def _job_prefix() -> str:
    """`job 3 (rank=8): ` inside a sweep, nothing outside."""
    current = HydraConfig.get()
    if current.mode != RunMode.MULTIRUN:
        return ""
    return f"job {current.job.num} ({' '.join(current.overrides.task)}): "


def _in_this_process() -> bool:
    """Whether this job's launcher runs it here, where a mistake can be noted; others must see it raised."""
    current = HydraConfig.get()
    return current.mode != RunMode.MULTIRUN or current.launcher._target_.endswith(".BasicLauncher")


def _call_hydra(command: Command, job: Job, parsed: Namespace) -> None:
    """What `hydra.main` does with arguments that are parsed already.

    Raises:
        UserError: The configuration cannot be composed.
    """
    started = False

    def task(config: DictConfig) -> Any:
        nonlocal started
        started = True
        return job(config)

    version.setbase("1.3")
    before = os.environ.get(_RAISES)
    os.environ[_RAISES] = "1"
    try:
        # In the help, too, the values that are used.
        arguments = Namespace(**(vars(parsed) | {"resolve": parsed.resolve or parsed.help}))
        _run_hydra(arguments, get_args_parser(), task, str(conf_dir()), command.name)
    except (*CONFIG_ERRORS, ValueError, RecursionError) as error:
        if started and not isinstance(error, CONFIG_ERRORS):
            raise
        raise UserError(explain(error, parsed.overrides, _config_class(command))) from error
    except OSError as error:
        if started or error.filename is None:
            raise
        raise UserError(
            f"hydra.sweep.dir: {error.filename} cannot be written ({error.strerror}); "
            "give another hydra.sweep.dir="
        ) from error
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        if before is None:
            del os.environ[_RAISES]
        else:
            os.environ[_RAISES] = before


def explain(error: Exception, overrides: Sequence[str], config_class: type) -> str:
    """Hydra's and OmegaConf's own errors in one line: what was wrong, what is allowed and what to do.

    Args:
        error: One of `CONFIG_ERRORS`, or what reading a file of the configuration raised.
        overrides: The `key=value` arguments of the command line.
        config_class: Class of the command's configuration.
    """
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override}: an override is written key=value (or group=option)"
        return (
            f"{error.override}: cannot be read as key=value; "
            "quote a value that has special characters or spaces, e.g. 'data.train=\"a (b).json\"'"
        )
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
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if f"'{override.key_or_group}'" in text or str(override.input_line) in text:
            absent = isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError)
            if told := _refused(override, absent, config_class):
                return told
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


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
    if where := re.match(r"In '(.+?)'", str(error)):
        return f"{where[1]}.yaml names {path} in its defaults list, which does not exist"
    return f"--config-name={path}: no such configuration in {conf_dir()}; add your own folder: -cd FOLDER"


def _refused(override: Override, absent: bool, config_class: type) -> str:
    """What is wrong with an override that Hydra could not apply; "" where its own words have to do.

    Args:
        absent: Whether the composed configuration lacks the key.
    """
    from mixlora_cli.config.settings import all_keys, unknown_key

    key, value = override.key_or_group, str(override.input_line).partition("=")[2]
    known = all_keys(config_class)
    if override.is_delete():
        return f"~{key}: there is no such key to delete" if override.value() is None else ""
    if "/" in key or override.package is not None:
        return f"{key}={value}: no such group; --help lists the groups and their options"
    if override.is_sweep_override() and not absent:
        return (
            f"{key}={value}: several values need -m (--multirun), which runs one job for each; "
            "a list is written key=[a,b], a text with a comma 'key=\"a,b\"'"
        )
    if key not in known:
        return unknown_key(key, value, known)
    if absent:
        group = key.split(".")[0]
        return f"{key}={value}: the chosen option of the group {group} does not use this key"
    return ""


def composed(root: str, config_class: type[T], overrides: Sequence[str]) -> T:
    """What the command `root` would run with, without running it.

    A grid asks for the same evaluation in every cell, and each composing takes Hydra a quarter of a second: it is kept.

    Raises:
        UserError: the overrides do not compose, or the command would refuse them.
    """
    found: T = _composed(root, config_class, tuple(overrides))  # type: ignore[arg-type]  # a class is hashable
    return found


@cache
def _composed(root: str, config_class: Any, overrides: tuple[str, ...]) -> Any:
    from mixlora_cli.config import load

    register()
    try:
        with _hydra_set_aside(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
            tree = compose(root, list(overrides))
    except CONFIG_ERRORS as error:
        raise UserError(explain(error, overrides, config_class)) from error
    return load(config_class, tree)


@contextmanager
def _hydra_set_aside() -> Iterator[None]:
    """Hydra composes for one application at a time, and a command is one itself."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running
