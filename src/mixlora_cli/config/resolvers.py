"""What `${name:...}` means in the YAML files: names of run folders, and the groups that `--help` lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from omegaconf import OmegaConf


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
