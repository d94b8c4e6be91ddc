"""Configuration of `mixlora reproduce`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from mixlora_cli.config.table import MINI_ALONE, TableName

MOST_JOBS = 4
"""Each takes some 2 to 4 GB of memory."""
What = Literal[TableName, "figures"]


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={'null' if value is None else value}: {allowed}")


@dataclass(frozen=True)
class SpeedConfig:
    """What the whole machine is known to do, for the estimate before anything has run (key `speed`)."""

    train: float
    """Instances that a training step goes through in a second; scale=mini."""
    answer: float
    """Instances that an evaluation answers in a second."""

    def __post_init__(self) -> None:
        _require(self.train > 0, "speed.train", self.train, "must be > 0")
        _require(self.answer > 0, "speed.answer", self.answer, "must be > 0")


@dataclass(frozen=True)
class ReproduceConfig:
    """Everything that `mixlora reproduce` reads."""

    output_dir: str
    """Folder of the cells; tables that need the same cell share it."""
    speed: SpeedConfig
    what: What | None = None
    scale: Literal["mini", "paper"] = "mini"
    seeds: list[int] | None = None
    """The first one for every row; the others for the rows in `replicated`."""
    replicated: list[str] | None = None
    """Experiments that are run with every seed; null = all."""
    only: list[str] | None = None
    """Experiments that are run; null = every row. What else is there is still shown."""
    budget: int | None = None
    """At most so many optimizer steps a training and instances a benchmark: a smoke run; null = no cut."""
    train: list[str] = field(default_factory=list)
    """Further overrides of every training."""
    evaluation: list[str] = field(default_factory=list)
    """Further overrides of every evaluation."""
    drawing: list[str] = field(default_factory=list)
    """Further overrides of every `mixlora interference` and `mixlora tsne`."""
    jobs: int | None = None
    """Cells that run at the same time, each on its share of the processor's cores; null = one for each core, at most
    `MOST_JOBS`, at scale=mini without a GPU, else 1."""
    keep_checkpoints: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        first, *others = get_args(What)
        known = f"say what: `mixlora reproduce {first}`, {', '.join(others)}"
        _require(self.what is not None, "what", self.what, known)
        _require(
            self.seeds is None or len(self.seeds) > 0, "seeds", self.seeds, "must name at least one seed"
        )
        _require(
            len(set(self.seeds or [])) == len(self.seeds or []),
            "seeds",
            self.seeds,
            "must differ from one another",
        )
        _require(self.budget is None or self.budget > 0, "budget", self.budget, "must be > 0 or null")
        _require(self.jobs is None or self.jobs > 0, "jobs", self.jobs, "must be > 0 or null")
        _require(
            self.what not in MINI_ALONE or self.scale == "mini",
            "scale",
            self.scale,
            f"`{self.what}` exists at scale=mini alone",
        )
