"""What Hydra composes beside the files in conf/: resolvers, how Hydra behaves, --help, routings, the paper's rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from mixlora_cli.commands import COMMANDS, Command
from mixlora_cli.paths import conf_dir
from mixlora_cli.routers import ROUTERS

_HYDRA = {
    # It neither changes the working directory nor leaves folders and logs of its own: the run folder is output_dir,
    # which the command makes itself and where it keeps the resolved configuration.
    "run": {"dir": "."},
    "output_subdir": None,
    # What a -m sweep was, as multirun.yaml.
    "sweep": {"dir": "runs/.multirun/${now:%Y-%m-%d_%H-%M-%S}", "subdir": "${hydra.job.num}"},
    # No log file, and no handler that would print every library's messages; but the line that announces a sweep's job.
    "job_logging": {"root": None},
    "hydra_logging": {
        "formatters": {"simple": {"format": "%(message)s"}},
        "root": {"level": "WARNING", "handlers": []},
        "loggers": {"hydra": {"level": "INFO", "handlers": ["console"]}},
    },
}
_HELP = """\
${{help_head:{name}}}
{groups}
keys and the values that this command line gives them (key.subkey=value changes one):
$CONFIG
flags:
  -m, --multirun          run every combination of comma-separated values
  -c, --cfg job           print the configuration and stop (--resolve fills in the interpolations)
  -cd, --config-dir DIR   add your own folder of configurations and group options
  -cn, --config-name X    start from X.yaml instead of {name}.yaml
  -i, --info              what the configuration is made of; --hydra-help tells more"""
_GROUPS = "\ngroups (group=option chooses one):\n${{config_groups:{groups}}}\n"


def register(command: str | None = None, experiments: bool = True) -> None:
    """Make all of it known to Hydra and OmegaConf; calling it again changes nothing.

    Args:
        command: The only one that is to be composed; None = any.
        experiments: Whether the paper's rows may be named.
    """
    functions = (
        *(run_name, usual_routing, by_size, passes, billions_in),
        *(eval_dir, last_part, grid_dir, joined, config_groups, help_head),
    )
    for resolver in functions:
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
    # Hydra copies the store for every group that it looks at, though what it takes out of it, it copies once more.
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    store = ConfigStore.instance()
    for name in COMMANDS if command is None else [command]:
        store.store(name, _hydra_node(COMMANDS[name]), "hydra/cli", "hydra", "mixlora")
    usual: Any = OmegaConf.load(conf_dir() / "routing" / "auto.yaml")  # has every key
    for router in ROUTERS.values():
        node = {"name": router.name, **{key: usual[key] for key in (*router.heeds, "health_every")}}
        store.store(router.name, node, "routing", None, "mixlora")
    if experiments:
        from mixlora_cli.reproduce.paper import register_experiments

        register_experiments()


def _hydra_node(command: Command) -> dict[str, Any]:
    groups = _GROUPS.format(groups=command.groups) if command.groups else ""
    return {**_HYDRA, "help": {"template": _HELP.format(name=command.name, groups=groups)}}


def run_name(adapter: str, rank: int, factors: int, routing: str, *, _root_: Any) -> str:
    """What tells this run from its neighbours: `lora-r4`, `mixlora-instance-e16-r4`, `full`."""
    if adapter == "mixlora":
        how = OmegaConf.select(_root_, "routing.router_init") or "random"
        if how == "random":
            how = OmegaConf.select(_root_, "adapter.pairing") or "separate"
        return f"mixlora-{routing}{'' if how == 'separate' else f'-{how}'}-e{factors}-r{rank}"
    return f"{adapter}-r{rank}" if adapter == "lora" else adapter


def usual_routing(source: str, metadata: str | None, tasks: Sequence[str] | None) -> str:
    """What routing=auto is: `task` for the built-in data and where a file of definitions is given, else `instance`.

    Also `instance` for one chosen task, for which `task` would use r factors alone; and for Vision-Flan, though its
    preparation finds definitions: there the paper (Table 2) has `instance` ahead.
    """
    defined = source in ("mini", "mini_text") or bool(metadata)
    return "task" if defined and (tasks is None or len(tasks) > 1) else "instance"


def by_size(small: Any, middle: Any, large: Any, *, _root_: Any) -> Any:
    """One of three values, by `model.billions`: below 0.3, below 6, from there on.

    Where that is null a built-in model is small, and any other one takes the middle.
    """
    billions = OmegaConf.select(_root_, "model.billions")
    if not isinstance(billions, int | float):
        return middle if OmegaConf.select(_root_, "model.source") in ("hub", "prepared") else small
    return small if billions < 0.3 else middle if billions < 6 else large


def passes(batch_size: Any, effective_batch: Any, *, _root_: Any) -> int:
    """Forward passes per step that make up for the smaller batches of a larger model: as many as give 16 instances."""
    says_itself = effective_batch is not None or not isinstance(batch_size, int)
    return (
        1 if says_itself or by_size(True, False, False, _root_=_root_) else max(1, 16 // max(1, batch_size))
    )


def billions_in(name_or_path: str | None) -> float | None:
    """The size that a model's name says, in billions of parameters: `Qwen2.5-VL-7B-Instruct` -> 7; None without one."""
    found = re.search(r"(?<![a-zA-Z0-9.])(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z0-9])", last_part(name_or_path, ""))
    return None if found is None else float(found[1]) / (1 if found[2] in "bB" else 1000)


def eval_dir(run: str | None, model: str, server: str | None = None, server_model: str | None = None) -> str:
    """Default folder of an evaluation: in the run that is evaluated, or by the untuned base's name.

    A server's answers lie beside, or by its model's name; by its own where the model is not named.
    """
    if server is None:
        return f"{run.rstrip('/')}/eval" if run else f"runs/{model}-base/eval"
    if run:
        return f"{run.rstrip('/')}/eval-server"
    name = server_model or server.rpartition("@")[2].rpartition("//")[2].removesuffix("/").removesuffix("/v1")
    return "runs/{}/eval".format(re.sub(r"[^\w.-]+", "-", name))


def last_part(path: str | Mapping[str, object] | None, default: str) -> str:
    """Last part of a path or hub id, without `.json`: `llava-hf/llava-1.5-7b-hf` -> `llava-1.5-7b-hf`.

    Of files by task the tasks' names, the first three of many.
    """
    if isinstance(path, Mapping):
        names = [re.sub(r"[^\w.-]", "_", str(task)) for task in path]
        return joined([*names[:3], f"and-{len(names) - 3}"] if len(names) > 3 else names)
    return PurePath(str(path)).name.removesuffix(".json").replace(":", "-") if path else default


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


def help_head(command: str) -> str:
    """What --help says of a command before it lists groups and keys."""
    return COMMANDS[command].head()
