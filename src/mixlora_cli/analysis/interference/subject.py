"""The adapter that is measured, and whether its gradients can be compared at all: found before a model is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mixlora_cli.config import InterferenceConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.subject import Subject, subject_at
from mixlora_cli.method.config import PEFT_TYPE
from mixlora_cli.training.run_folder import RunFolder


@dataclass(frozen=True)
class Measured:
    """A finished LoRA or MixLoRA adapter."""

    subject: Subject
    folder: Path
    routing: str | None
    """How it selects factors; None for LoRA, which selects nothing."""
    trained_on: str | None
    """`data.source` of the training; None for a bare adapter."""


def find_measured(config: InterferenceConfig) -> Measured:
    """Resolve `run`.

    Raises:
        UserError: there is no finished LoRA or MixLoRA adapter.
    """
    assert config.run is not None  # the configuration's own check
    subject = subject_at(config.run, config.model)
    folder = subject.adapter
    assert folder is not None
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(
            f"run={config.run} trained the model's own weights and has no low-rank adapter; expected a run of "
            "adapter=lora or adapter=mixlora"
        )
    try:
        saved: Any = json.loads(path.read_text(encoding="utf-8"))
        kind = saved["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as an adapter's configuration ({error})") from None
    if kind not in ("LORA", PEFT_TYPE):
        raise UserError(
            f"run={config.run} holds an adapter of kind {kind}; expected LORA or {PEFT_TYPE.value}"
        )
    routing = str(saved.get("routing")) if kind == PEFT_TYPE else None
    return Measured(subject, folder, routing, _training_data(RunFolder(Path(config.run).expanduser())))


def _training_data(run: RunFolder) -> str | None:
    if not run.started:
        return None
    saved: Any = OmegaConf.to_container(OmegaConf.load(run.config))  # read before, by `subject_at`
    source = saved.get("data", {}).get("source")
    return None if source is None else str(source)
