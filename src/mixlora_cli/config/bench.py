"""What `mixlora bench` reads: which parts are measured, on which layers, and how often."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from mixlora_cli.config.schema import DataConfig, ModelConfig

Part = Literal["layer", "operations", "memory", "step", "generation", "evaluation", "scoring"]
Precision = Literal["fp32", "bf16"]

PARTS: tuple[Part, ...] = get_args(Part)
_SHAPE = re.compile(r"([1-9]\d*)(?:x([1-9]\d*))?")


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        shown = "null" if value is None else value
        raise ValueError(f"{key}={shown}: {allowed}")


@dataclass(frozen=True)
class BenchSettings:
    """Key `bench`; where a value is null, `quick` decides what it is (see `bench/plan.py`)."""

    parts: list[Part] = field(default_factory=lambda: list(PARTS))
    quick: bool = False
    shapes: list[str] | None = None
    """Widths of the layers: "1024" is square, "4096x11008" maps 4096 features to 11008."""
    dtypes: list[Precision] = field(default_factory=lambda: ["fp32", "bf16"])
    batches: list[int] | None = None
    pools: list[int] | None = None
    """Sizes E of the factor pools."""
    tokens: int | None = None
    """Tokens of each instance in the layers; null: by width, so that wide layers do not take all the time."""
    rounds: int | None = None
    """Counted rounds of each case; in each, every variant runs once, in an order drawn anew."""
    warmup: int | None = None
    """Rounds before, not counted."""
    min_seconds: float | None = None
    """A case that is quicker goes on with more rounds."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the whole model."""
    step_batch_size: int | None = None
    answer_batch_size: int | None = None
    max_new_tokens: int | None = None
    instances: int | None = None
    """Prompts of the evaluation part, answered in one batch after another and then one by one."""
    evaluation_rounds: int | None = None
    """Counted rounds of the evaluation part, whose answers one by one take long."""
    predictions: int | None = None
    """Stored answers that the scoring part scores."""
    threads: int | None = None
    """Threads of torch; null: as many as it chooses itself."""

    def __post_init__(self) -> None:
        _require(bool(self.parts), "bench.parts", self.parts, f"choose of {', '.join(PARTS)}")
        _require(bool(self.dtypes), "bench.dtypes", self.dtypes, "choose of fp32, bf16")
        for shape in self.shapes or ():
            allowed = "a width, or two joined by x: [576,4096x11008]"
            _require(_SHAPE.fullmatch(shape) is not None, "bench.shapes", shape, allowed)
        for key in ("shapes", "batches", "pools"):
            _require(getattr(self, key) != [], f"bench.{key}", "[]", "give at least one, or null")
        for key in ("batches", "pools"):
            for number in getattr(self, key) or ():
                _require(number > 0, f"bench.{key}", number, "must be > 0")
        for key in ("warmup", "min_seconds"):
            number = getattr(self, key)
            _require(number is None or number >= 0, f"bench.{key}", number, "must be >= 0 or null")
        for key in _COUNTS:
            number = getattr(self, key)
            _require(number is None or number > 0, f"bench.{key}", number, "must be > 0 or null")


_COUNTS = (
    "tokens",
    "rounds",
    "step_batch_size",
    "answer_batch_size",
    "max_new_tokens",
    "instances",
    "evaluation_rounds",
    "predictions",
    "threads",
)


def parse_shape(shape: str) -> tuple[int, int]:
    """(d_in, d_out) of "1024" or "4096x11008"."""
    found = _SHAPE.fullmatch(shape)
    assert found is not None  # checked when the configuration was read
    return int(found[1]), int(found[2] or found[1])


@dataclass(frozen=True)
class BenchConfig:
    """Everything that `mixlora bench` reads."""

    model: ModelConfig
    data: DataConfig
    bench: BenchSettings
    output_dir: str
    rank: int = 4
    """Of LoRA and of MixLoRA, the same."""
    factors: int = 16
    """E of the MixLoRA that is compared with LoRA."""
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "rank", self.rank, "must be >= 1")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2^32)")
        for factors in (self.factors, *(self.bench.pools or ())):
            _require(
                self.rank <= factors,
                "rank",
                self.rank,
                f"must be <= {factors}, the smallest pool, because rank factors are selected out of it",
            )
