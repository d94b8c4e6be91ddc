"""What is evaluated: the base alone, or the adapter of a run folder on the base that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mixlora_cli.config.parse import parse
from mixlora_cli.config.schema import EvalConfig, ModelConfig
from mixlora_cli.errors import UserError
from mixlora_cli.training.run_folder import RunFolder

BASE_LABEL = "base"


@dataclass(frozen=True)
class Subject:
    """A model to evaluate."""

    label: str
    """Its row's name in tables: "base", "LoRA r=4", "MixLoRA E=16 r=4"."""
    model: ModelConfig
    adapter: Path | None
    """Folder of the adapter; None for the base alone."""
    run: Path | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def find_subject(config: EvalConfig) -> Subject:
    """Resolve `run` and `adapter`: a run folder, a folder with a PEFT adapter (on `model`), or nothing (the
    base).

    Raises UserError when the folder is missing, is no run, or its run has not finished.
    """
    if config.run is None:
        return Subject(BASE_LABEL, config.model, adapter=None)
    if config.adapter.name == "none":
        raise UserError(
            f"adapter=none is the untuned base, run={config.run} a trained adapter: give one of the two"
        )
    return subject_at(config.run, config.model)


def subject_at(run: str, model: ModelConfig) -> Subject:
    """The adapter in a run folder, or in a bare folder with a PEFT adapter, which is put on `model`.

    Raises UserError when the folder is missing, is no run, or its run has not finished.
    """
    folder = RunFolder(Path(run).expanduser())
    if not folder.root.is_dir():
        raise UserError(f"run={run}: no such folder; expected the run folder that `mixlora train` printed")
    if folder.started:
        return _of_run(folder)
    if (folder.root / "adapter_config.json").is_file():
        return Subject(folder.root.name, model, adapter=folder.root, run=folder.root)
    raise UserError(
        f"run={run} is no run folder: expected config.yaml in it, as `mixlora train` writes, "
        "or adapter_config.json"
    )


def _of_run(folder: RunFolder) -> Subject:
    if not folder.finished:
        raise UserError(
            f"run={folder.root} has not finished: continue it with "
            f"`mixlora train ... output_dir={folder.root} resume=auto`"
        )
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder.config), resolve=True)
        return Subject(
            label=_label(config),
            model=parse(ModelConfig, config["model"], "model"),
            adapter=folder.adapter,
            run=folder.root,
            precision=config["train"]["precision"],
        )
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        YAMLError,
        OmegaConfBaseException,
        UserError,
    ) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder.config} is not a configuration that `mixlora train` wrote: {reason}"
        ) from error


def _label(config: Mapping[str, Any]) -> str:
    name = config["adapter"]["name"]
    if name == "lora":
        return f"LoRA r={config['rank']}"
    if name == "mixlora":
        routing = config["routing"]["name"]
        suffix = "" if routing == "instance" else f" {routing}"
        return f"MixLoRA E={config['factors']} r={config['rank']}{suffix}"
    return str(name)
