"""Typed configuration of `mixlora check`; see `config/schema.py` for the groups that it shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixlora_cli.config.schema import DataConfig, ModelConfig


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value}: {allowed}")


@dataclass(frozen=True)
class CheckOptions:
    """What is looked at (key `check`)."""

    lengths: bool = True
    """Tokenise every record with the model's tokenizer: lengths and label masks."""
    images: bool = True
    """Open every picture."""
    leakage: bool = True
    """Compare the training records with the evaluation sets, pictures and texts."""
    benchmarks: list[str] | None = None
    """Benchmarks that do not come with the data, to compare as well; as `eval.benchmarks`, "paper" = all eight."""
    sources: dict[str, str] | None = None
    """Their local copies and YAML files of your own, by name; as `eval.sources`."""
    near: int = 10
    """Pictures whose perceptual hashes differ in at most so many of 256 bits count as near-duplicates."""
    strict: bool = False
    """Remarks, too, make the exit code 1."""
    examples: int = 3
    """First examples of each finding that are shown; the report file has ten times as many."""
    workers: int | None = None
    """Processes; null = one for each processor, at most 8."""

    def __post_init__(self) -> None:
        _require(0 <= self.near <= 64, "check.near", self.near, "must be from 0 to 64")
        _require(self.examples > 0, "check.examples", self.examples, "must be > 0")
        _require(
            self.workers is None or self.workers > 0, "check.workers", self.workers, "must be > 0 or null"
        )


@dataclass(frozen=True)
class CheckConfig:
    """Everything that `mixlora check` reads."""

    model: ModelConfig
    data: DataConfig
    output_dir: str
    check: CheckOptions = field(default_factory=CheckOptions)
