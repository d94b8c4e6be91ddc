"""Configuration of `mixlora export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mixlora_cli.config.schema import DataConfig, ModelConfig


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={'null' if value is None else value}: {allowed}")


@dataclass(frozen=True)
class FitConfig:
    """Which inputs the static adapter is fitted to, how large it is, and how it is compared (key `export`)."""

    tasks: list[str] | None = None
    """Only these tasks; null = all that the split has."""
    per_task: bool = False
    """One adapter for each task; else one for all inputs together."""
    split: Literal["train", "heldout", "unseen"] = "train"
    """Where the inputs come from."""
    instances: int = 64
    """At most so many inputs of each task, a seeded sample."""
    rank: int | None = None
    """Rank of the static adapter, at most the factors in a pool; null = as large as the mean update's own."""
    evaluate: bool = True
    """Compare base, MixLoRA and static adapter on held-out instances."""
    limit: int | None = None
    """At most so many instances of each task are compared, a seeded sample; null = all."""
    batch_size: int = 16
    max_new_tokens: int = 24
    cache_features: bool = True

    def __post_init__(self) -> None:
        for key in ("instances", "batch_size", "max_new_tokens"):
            _require(getattr(self, key) > 0, f"export.{key}", getattr(self, key), "must be > 0")
        for key in ("rank", "limit"):
            value = getattr(self, key)
            _require(value is None or value > 0, f"export.{key}", value, "must be > 0 or null")
        _require(self.tasks != [], "export.tasks", "[]", "must name at least one task, or null for all")


@dataclass(frozen=True)
class ExportConfig:
    """Everything that `mixlora export` reads."""

    model: ModelConfig
    """Base of a bare adapter folder; a run folder brings its own."""
    data: DataConfig
    export: FitConfig
    output_dir: str
    run: str | None = None
    """Run folder of `mixlora train`, or a folder with a MixLoRA adapter."""
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2^32)")
        _require(
            self.run is not None,
            "run",
            self.run,
            "give run=<folder of a finished `mixlora train adapter=mixlora`>",
        )
