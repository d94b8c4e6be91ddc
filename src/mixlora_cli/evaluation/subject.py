"""What is evaluated: the base alone, or the adapter of a run folder on the base that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from peft import PeftConfig
from yaml import YAMLError

from mixlora_cli.config import EvalConfig, ModelConfig, parse
from mixlora_cli.errors import UserError
from mixlora_cli.method.config import MixLoraConfig
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


@dataclass(frozen=True)
class MixLoraSubject:
    """A finished MixLoRA adapter, for commands that ask how it selects."""

    subject: Subject
    folder: Path
    """Its adapter folder."""
    adapter: MixLoraConfig


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


def mixlora_at(run: str, model: ModelConfig, own_weights: str, other_kind: str) -> MixLoraSubject:
    """The finished MixLoRA adapter of `subject_at`.

    Args:
        own_weights: what to say of a run that trained the model's own weights.
        other_kind: what to say of an adapter of another kind; "{folder}" stands for its folder.

    Raises:
        UserError: there is none.
    """
    subject = subject_at(run, model)
    folder = subject.adapter
    assert folder is not None
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"run={run} trained the model's own weights: {own_weights}")
    adapter = PeftConfig.from_pretrained(str(folder))
    if not isinstance(adapter, MixLoraConfig):
        reason = other_kind.format(folder=folder)
        raise UserError(f"run={run} holds a {adapter.peft_type} adapter, which {reason}")
    return MixLoraSubject(subject, folder, adapter)


def refuse_adapter_folder(folder: Path) -> None:
    """Raise UserError where a command's own files would mix with a trained adapter's."""
    if RunFolder(folder).started or (folder / "adapter_config.json").is_file():
        raise UserError(f"output_dir={folder} holds a trained adapter; give a folder of its own")


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
            model=parse(ModelConfig, config["model"]),
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
