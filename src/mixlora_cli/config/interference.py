"""Configuration of `mixlora interference`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mixlora_cli.config.launch import LaunchConfig
from mixlora_cli.config.schema import DataConfig, ModelConfig

Variant = Literal["mean", "median", "ratio_of_means", "cosine"]


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={'null' if value is None else value}: {allowed}")


@dataclass(frozen=True)
class GradientConfig:
    """Which gradients are taken (key `interference`)."""

    split: Literal["train", "heldout"] = "train"
    """Where the instances come from."""
    batches: int = 16
    """Batches of each task, fewer where it has not enough instances."""
    batch_size: int = 8
    precision: Literal["run", "auto", "fp32", "bf16"] = "run"
    """Number format of the matrix products; `run` = that of the training."""
    near_zero: float = 0.01
    """A denominator counts as near zero where the cosine of its two vectors is below this."""
    cache_features: bool = True

    def __post_init__(self) -> None:
        _require(self.batches >= 2, "interference.batches", self.batches, "must be >= 2")
        _require(self.batch_size > 0, "interference.batch_size", self.batch_size, "must be > 0")
        _require(0 < self.near_zero < 1, "interference.near_zero", self.near_zero, "must be in (0, 1)")


@dataclass(frozen=True)
class DrawConfig:
    """What the figures show (key `draw`); changing it needs no model."""

    layers: list[int] | None = None
    """Transformer layers of the figure by layer, counted from 0; null = the middle of each third."""
    score: Variant = "mean"
    """The paper's mean of ratios, or a variant that near-zero denominators move less."""

    def __post_init__(self) -> None:
        _require(self.layers != [], "draw.layers", "[]", "must name at least one layer, or be null")
        for layer in self.layers or []:
            _require(layer >= 0, "draw.layers", layer, "must be >= 0; the first layer is 0")


@dataclass(frozen=True)
class MeasureConfig:
    """Real steps beside their estimate (key `measure`)."""

    lambdas: list[float] | None = None
    """Lengths of the steps; null = no step is made."""
    batches: int = 1
    """Pairs of batches for each pair of tasks."""

    def __post_init__(self) -> None:
        _require(self.lambdas != [], "measure.lambdas", "[]", "must name at least one length, or be null")
        for length in self.lambdas or []:
            _require(length > 0, "measure.lambdas", length, "must be > 0")
        _require(self.batches > 0, "measure.batches", self.batches, "must be > 0")


@dataclass(frozen=True)
class InterferenceConfig:
    """Everything that `mixlora interference` reads."""

    model: ModelConfig
    """Base of a bare adapter folder; a run folder brings its own."""
    data: DataConfig
    output_dir: str
    interference: GradientConfig = field(default_factory=GradientConfig)
    draw: DrawConfig = field(default_factory=DrawConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    run: str | None = None
    """Run folder of `mixlora train`, or a folder with a LoRA or MixLoRA adapter."""
    tasks: list[str] | None = None
    """Tasks to compare with one another; null = all of the data."""
    default_tasks: dict[str, object] = field(default_factory=dict)
    """By `data.source`: what the YAML file fills into `tasks`."""
    compare: str | None = None
    """Another run, or its interference folder, measured before on the same instances."""
    draw_only: bool = False
    seed: int = 0
    overwrite: bool = False
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2^32)")
        _require(
            self.run is not None,
            "run",
            self.run,
            "give run=<folder of a finished `mixlora train adapter=lora` or adapter=mixlora>; the untuned base has no "
            "adapter whose gradients could be compared",
        )
        if self.tasks is not None:
            _require(
                len(set(self.tasks)) >= 2,
                "tasks",
                f"[{','.join(self.tasks)}]",
                "must name at least two tasks: a task cannot disturb itself",
            )
