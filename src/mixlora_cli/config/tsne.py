"""Configuration of `mixlora tsne`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mixlora_cli.config.schema import DataConfig, ModelConfig

Side = Literal["a", "b"]


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={'null' if value is None else value}: {allowed}")


@dataclass(frozen=True)
class MapConfig:
    """Which selections are drawn, and how (key `tsne`)."""

    instances: int = 300
    """At most so many instances of each task, a seeded sample."""
    sides: list[Side] = field(default_factory=lambda: ["a", "b"])
    """Factors of A, of B, or both."""
    linear: str = "gate_proj"
    """The linear layer of each block whose selections are read."""
    layers: list[int] | None = None
    """Numbers of the blocks that are drawn, from 0; null = the first, the middle and the last."""
    perplexity: float = 30.0
    """Of t-SNE; lower where there are too few points."""
    neighbours: int = 10
    """k of the nearest-neighbour purity; lower where a task has fewer instances."""
    permutations: int = 200
    """Shuffles of the task labels that say what chance gives."""
    routing_seed: int | None = None
    """Seed of a random routing's draws; required there, and of no use elsewhere."""
    batch_size: int = 16
    cache_features: bool = True
    page_mb: float = 12.0
    """Megabytes of pictures in the interactive page: they get smaller, and then fewer, until they fit."""

    def __post_init__(self) -> None:
        for key in ("neighbours", "batch_size"):
            _require(getattr(self, key) > 0, f"tsne.{key}", getattr(self, key), "must be > 0")
        _require(self.instances >= 2, "tsne.instances", self.instances, "must be >= 2")
        _require(self.perplexity >= 1, "tsne.perplexity", self.perplexity, "must be >= 1")
        _require(self.permutations >= 20, "tsne.permutations", self.permutations, "must be >= 20")
        _require(self.page_mb >= 0, "tsne.page_mb", self.page_mb, "must be >= 0; 0 = no pictures")
        _require(bool(self.sides), "tsne.sides", "[]", "must name a, b or both")
        _require(
            self.layers is None or bool(self.layers), "tsne.layers", "[]", "must name a layer, or be null"
        )
        _require(
            self.routing_seed is None or 0 <= self.routing_seed < 2**32,
            "tsne.routing_seed",
            self.routing_seed,
            "must be in [0, 2^32), or null",
        )


@dataclass(frozen=True)
class TsneConfig:
    """Everything that `mixlora tsne` reads."""

    model: ModelConfig
    """Base of a bare adapter folder; a run folder brings its own."""
    data: DataConfig
    tsne: MapConfig
    output_dir: str
    run: str | None = None
    """Run folder of `mixlora train adapter=mixlora`, or a folder with a MixLoRA adapter."""
    tasks: list[str] | None = None
    """Unseen benchmarks, or seen tasks (their held-out instances); null = the data's unseen benchmarks but MME."""
    pairs: list[list[str]] | None = None
    """[[seen, unseen], ...]: tasks that are drawn in matched colours (Fig. 6), in the place of `tasks`."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2^32)")
        _require(
            self.run is not None,
            "run",
            self.run,
            "give run=<folder of a finished `mixlora train adapter=mixlora`>",
        )
        _require(
            self.tasks is None or self.pairs is None,
            "pairs",
            self.pairs,
            "names the tasks itself; give tasks or pairs, not both",
        )
        _require(
            self.tasks is None or len(set(self.tasks)) > 1,
            "tasks",
            self.tasks,
            "must name two different tasks or more: a map of one task compares it with nothing",
        )
        pairs = self.pairs
        _require(
            pairs is None or (bool(pairs) and all(len(set(pair)) == 2 and len(pair) == 2 for pair in pairs)),
            "pairs",
            pairs,
            "must be [[seen,unseen],...], two different tasks in each pair",
        )
