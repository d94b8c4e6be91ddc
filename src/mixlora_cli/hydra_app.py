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
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

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
from mixlora_cli.launch import cluster_environment
from mixlora_cli.output import one_line_errors
from mixlora_cli.paths import conf_dir
from mixlora_cli.reproduce.paper import register_experiments

Job = Callable[[DictConfig], Any]
CONFIG_ERRORS = (HydraException, OmegaConfBaseException, MarkedYAMLError)


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
    from mixlora_cli.config.load import load

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
    from mixlora_cli.config.load import load

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
    from mixlora_cli.config.settings import all_keys, unknown_key

    value = dict(text.partition("=")[::2] for text in overrides).get(key, "")
    if "/" in key or "@" in key:
        return f"{key}={value}: no such group; --help lists the groups and their options"
    known = all_keys(config_class)
    if key in known:
        group = key.split(".")[0]
        return f"{key}={value}: the chosen option of the group {group} does not use this key"
    return unknown_key(key, value, known)


def register_resolvers() -> None:
    """Make the resolvers known to OmegaConf; calling it again changes nothing."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("eval_dir", eval_dir, replace=True)
    OmegaConf.register_new_resolver("last_part", last_part, replace=True)
    OmegaConf.register_new_resolver("config_groups", config_groups, replace=True)
    OmegaConf.register_new_resolver("joined", joined, replace=True)
    OmegaConf.register_new_resolver("grid_dir", grid_dir, replace=True)
    OmegaConf.register_new_resolver("usual_routing", usual_routing, replace=True)


def run_name(adapter: str, rank: int, factors: int, routing: str) -> str:
    """What tells this run from its neighbours: `lora-r4`, `mixlora-instance-e16-r4`, `full`."""
    if adapter == "mixlora":
        return f"mixlora-{routing}-e{factors}-r{rank}"
    return f"{adapter}-r{rank}" if adapter == "lora" else adapter


def usual_routing(source: str, metadata: str | None, tasks: Sequence[str] | None) -> str:
    """What routing=auto is: `task` for data=mini and where a file of definitions is given, else `instance`.

    Also `instance` for one chosen task, for which `task` would use r factors alone; and for Vision-Flan, though its
    preparation finds definitions: there the paper (Table 2) has `instance` ahead.
    """
    defined = source == "mini" or bool(metadata)
    return "task" if defined and (tasks is None or len(tasks) > 1) else "instance"


def eval_dir(run: str | None, model: str) -> str:
    """Default folder of an evaluation: in the run that is evaluated, or by the untuned base's name."""
    return f"{run.rstrip('/')}/eval" if run else f"runs/{model}-base/eval"


def last_part(path: str | None, default: str) -> str:
    """Last part of a path or hub id, without `.json`: `llava-hf/llava-1.5-7b-hf` -> `llava-1.5-7b-hf`."""
    return PurePath(str(path)).name.removesuffix(".json") if path else default


def grid_dir(scale: str, budget: int | None) -> str:
    """Default folder of a grid's cells; those of a smoke run lie apart, so that no table takes them for real ones."""
    return f"runs/reproduce/{scale}" + ("" if budget is None else f"-budget{budget}")


def joined(names: Sequence[str] | None) -> str:
    """Names in one, as part of a folder's name: `[GQA, VQAv2]` -> `GQA-VQAv2`, none -> `all`."""
    return "-".join(names) if names else "all"


def config_groups(*groups: str) -> str:
    """One line for each group with its options, those of the user's own folder (`-cd`) included."""
    from hydra.core.global_hydra import GlobalHydra

    loader = GlobalHydra.instance().config_loader()
    options = {group: ", ".join(sorted(loader.get_group_options(group))) for group in groups}
    return "\n".join(f"  {group + ':':<12}{names}" for group, names in options.items())
