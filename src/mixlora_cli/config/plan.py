"""Typed configuration of `mixlora plan`: that of a training and the machine it would run on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mixlora_cli.config.schema import TrainConfig

GpuName = Literal["a100-40gb", "a100-80gb", "h100", "h200", "l40s", "rtx4090"]


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={'null' if value is None else value}: {allowed}")


@dataclass(frozen=True)
class MachineConfig:
    """The GPUs, and what is assumed of the data (key `plan`)."""

    gpu: GpuName = "a100-80gb"
    gpus: int = 4
    """Of all nodes together."""
    mfu: float = 0.3
    """Operations really done per second, recomputation included, as a share of the GPU's bf16 peak."""
    instances: int | None = None
    """Training instances; null = counted, or the published number for Vision-Flan."""
    tokens: float | None = None
    """Mean tokens of an instance, image tokens included; null = image tokens + an estimate of the text."""
    label_tokens: float = 20
    """Mean tokens of an instance that carry loss."""
    padding: float | None = None
    """Share of a batch that is padding; null = 0.02 grouped by length, else 0.2."""

    def __post_init__(self) -> None:
        _require(self.gpus > 0, "plan.gpus", self.gpus, "must be > 0")
        _require(0 < self.mfu <= 1, "plan.mfu", self.mfu, "must be in (0, 1]")
        _require(
            self.instances is None or self.instances > 0, "plan.instances", self.instances, "must be > 0"
        )
        _require(self.tokens is None or self.tokens >= 1, "plan.tokens", self.tokens, "must be >= 1")
        _require(self.label_tokens > 0, "plan.label_tokens", self.label_tokens, "must be > 0")
        _require(
            self.padding is None or 0 <= self.padding < 1, "plan.padding", self.padding, "must be in [0, 1)"
        )


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Everything that `mixlora plan` reads: a training's configuration, so that any of its commands can be planned."""

    plan: MachineConfig = field(default_factory=MachineConfig)
