"""Run a command through Hydra: overrides, sweeps, `--cfg`, `--help`; a user's mistake is one line, exit code 2."""

from __future__ import annotations

import importlib
import io
import os
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mixlora_cli.config.explain import CONFIG_ERRORS, explain
from mixlora_cli.config.load import load
from mixlora_cli.config.resolvers import register_resolvers
from mixlora_cli.errors import UserError, WorkerFailed
from mixlora_cli.launch.environment import cluster_environment
from mixlora_cli.output import one_line_errors
from mixlora_cli.paths import conf_dir
from mixlora_cli.reproduce.paper import register_experiments

FAILURE = 1
USER_MISTAKE = 2
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C

Job = Callable[[DictConfig], Any]


@dataclass(frozen=True)
class Command:
    """A subcommand that Hydra configures."""

    name: str
    """Also the name of its root file in the configuration tree."""
    config_class: type
    entry: str
    """`module:function` that takes the parsed configuration; imported only once that has been accepted."""


def run_command(command: Command, arguments: Sequence[str]) -> int:
    """Run `mixlora <command> <arguments>` and return its exit code: 0, 1 (a worker failed), 2 (a user's mistake), 130.

    Errors that are not the user's propagate with their traceback.
    """
    try:
        register_resolvers()
        register_experiments()
        parsed = _parse_arguments(arguments)
        if _is_sweep(parsed):
            _check_sweep(command, arguments, parsed)
        return _run_jobs(command, arguments, parsed)
    except UserError as error:
        report(error)
        return USER_MISTAKE
    except WorkerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED


def report(error: UserError, prefix: str = "") -> None:
    """Print a user's mistake as one line on standard error."""
    print(f"error: {prefix}{' '.join(str(error).splitlines())}", file=sys.stderr)


def _parse_arguments(arguments: Sequence[str]) -> Namespace:
    """Hydra's own flags and overrides.

    Raises:
        UserError: Unknown flag, or a flag without its value (argparse would print its whole usage).
    """
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return get_args_parser().parse_intermixed_args(list(arguments))
    except SystemExit as stop:
        if not stop.code:
            raise
        reason = printed.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"{reason}; --help lists the flags") from None


def _is_sweep(parsed: Namespace) -> bool:
    stops_early = parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion
    return not stops_early and (parsed.multirun or "hydra.mode=MULTIRUN" in parsed.overrides)


def _run_jobs(command: Command, arguments: Sequence[str], parsed: Namespace) -> int:
    """Hydra's run or sweep; in a sweep, one job's mistake does not keep the others from running."""
    mistakes: list[UserError] = []

    def job(config: DictConfig) -> Any:
        try:
            settings: Any = load(command.config_class, config)
            with one_line_errors(_output(settings)):
                return _entry(command)(settings)
        except UserError as error:
            if not _in_this_process():
                raise
            mistakes.append(error)
            report(error, _job_prefix())
            if _one_of_several():
                raise SystemExit(USER_MISTAKE) from None
            return None
        except Exception:
            if not _one_of_several():
                raise
            traceback.print_exc()
            raise SystemExit(FAILURE) from None

    _call_hydra(command, job, _ordered(arguments, parsed), parsed)
    return USER_MISTAKE if mistakes else 0


def _output(settings: Any) -> Path | None:
    folder = getattr(settings, "output_dir", None)  # `mixlora judge` has none
    return None if folder is None else Path(folder)


def _check_sweep(command: Command, arguments: Sequence[str], parsed: Namespace) -> None:
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
            settings: Any = load(command.config_class, config)
            folder = settings.output_dir
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
        kept = [text for text in _ordered(arguments, parsed) if not text.lstrip("+").startswith(launchers)]
        _call_hydra(command, check, [*kept, *quietly], parsed)
    if mistakes:
        raise mistakes[0]


def _job_prefix() -> str:
    """`job 3 (rank=8): ` inside a sweep, nothing outside."""
    current = HydraConfig.get()
    if current.mode != RunMode.MULTIRUN:
        return ""
    return f"job {current.job.num} ({' '.join(current.overrides.task)}): "


def _one_of_several() -> bool:
    """Whether others run this job, too: then a failed one is not left for the next, in which they may not be yet."""
    return cluster_environment(os.environ) is not None


def _in_this_process() -> bool:
    """Whether this job's launcher runs it here, where a mistake can be noted; others must see it raised."""
    current = HydraConfig.get()
    return current.mode != RunMode.MULTIRUN or current.launcher._target_.endswith(".BasicLauncher")


def _entry(command: Command) -> Callable[[Any], Any]:
    module, _, function = command.entry.partition(":")
    entry: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    return entry


def _ordered(arguments: Sequence[str], parsed: Namespace) -> list[str]:
    """Flags first, overrides last, because Hydra's parser wants the overrides in one piece."""
    flags = list(arguments)
    for override in parsed.overrides:
        flags.reverse()
        flags.remove(override)
        flags.reverse()
    return [*flags, *parsed.overrides]


def _call_hydra(command: Command, job: Job, arguments: Sequence[str], parsed: Namespace) -> None:
    """Hand over to `hydra.main`.

    Raises:
        UserError: The configuration cannot be composed.
    """
    started = False

    def task(config: DictConfig) -> Any:
        nonlocal started
        started = True
        return job(config)

    application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command.name)(task)
    try:
        with _program(f"mixlora {command.name}", arguments), _raised_errors():
            application()
    except (*CONFIG_ERRORS, ValueError, RecursionError) as error:
        if started and not isinstance(error, CONFIG_ERRORS):
            raise
        raise UserError(explain(error, parsed.overrides, command.config_class)) from error
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


@contextmanager
def _program(name: str, arguments: Sequence[str]) -> Iterator[None]:
    """Hydra reads its arguments from `sys.argv`."""
    before = sys.argv
    sys.argv = [name, *arguments]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _raised_errors() -> Iterator[None]:
    """Hydra prints its errors and exits with 1, unless this variable asks for the exceptions themselves."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
