"""Typed configuration: every key that YAML or an override may set, with type, default and allowed values.

`config/load.py` turns Hydra's `DictConfig` into these dataclasses once; nothing after it sees a dictionary.
Each `__post_init__` raises `ValueError` with the key, the value and what is allowed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from mixlora_cli.config.judge import JudgeConfig
from mixlora_cli.config.launch import LaunchConfig

AdapterName = Literal["lora", "mixlora", "full", "none"]
RoutingName = Literal["instance", "task", "random"]


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        shown = "null" if value is None else value
        raise ValueError(f"{key}={shown}: {allowed}")


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@dataclass(frozen=True)
class ModelConfig:
    """The base vision-language model (group `model`)."""

    name: str
    source: Literal["mini", "tiny", "hub", "prepared"]
    name_or_path: str | None = None
    """Hugging Face id or local folder of a LLaVA-class checkpoint; required for `source=hub`."""
    revision: str | None = None
    template: str = "v1"
    """Conversation template, a key of `data.template.TEMPLATES`; the same one trains and evaluates."""
    attn_implementation: str = "eager"
    train_projector: bool = False

    def __post_init__(self) -> None:
        _require(
            self.source != "hub" or bool(self.name_or_path),
            "model.name_or_path",
            self.name_or_path,
            "model=hf needs a Hugging Face id or a local folder of a LLaVA-class checkpoint",
        )


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained (group `adapter`): PEFT's LoRA, MixLoRA, all language-model weights, or nothing."""

    name: AdapterName
    alpha: float | None = None
    """Numerator of the scale alpha / rank; default 2 * rank for LoRA, 2 * factors for MixLoRA (App. B)."""
    dropout: float = 0.05
    cfs: Literal["paper", "released", "none"] = "paper"
    router_grad: Literal["none", "straight_through"] = "none"
    target_modules: str = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    """Regular expression that must match a module's whole name."""

    def __post_init__(self) -> None:
        _require(self.alpha is None or self.alpha > 0, "adapter.alpha", self.alpha, "must be > 0")
        _require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "must be in [0, 1)")
        _require(
            _is_regex(self.target_modules),
            "adapter.target_modules",
            self.target_modules,
            "must be a regular expression",
        )


_HEEDED_BY = {"pool": ("instance",), "decode": ("instance", "random")}
"""By which routings a key of theirs is heeded."""


@dataclass(frozen=True)
class RoutingConfig:
    """How MixLoRA picks its factors (group `routing`)."""

    name: RoutingName
    pool: Literal["all", "prompt"] = "all"
    decode: Literal["prefill", "step"] = "prefill"
    encoder: str | None = None
    """routing=task: Hugging Face id or local folder of the frozen language model that reads the task definitions;
    null = the base's own."""
    balance_loss: float = 0.0
    """Weight of the load-balancing loss of trained routers; 0 = none."""
    health_every: int = 50
    """Training steps between two looks at how the factors are used; 0 = never."""

    def __post_init__(self) -> None:
        _require(
            self.encoder is None or self.name == "task",
            "routing.encoder",
            self.encoder,
            f"routing={self.name} reads no task definitions; only null",
        )
        _require(self.balance_loss >= 0, "routing.balance_loss", self.balance_loss, "must be >= 0")
        _require(
            self.balance_loss == 0 or self.name != "random",
            "routing.balance_loss",
            self.balance_loss,
            "routing=random has no routers to balance; only 0",
        )
        _require(self.health_every >= 0, "routing.health_every", self.health_every, "must be >= 0; 0 = never")


@dataclass(frozen=True)
class DataConfig:
    """Training and evaluation records (group `data`): LLaVA-format JSON plus an image folder."""

    name: str
    source: Literal["mini", "json", "vision_flan"]
    root: str | None = None
    """Folder that `mixlora prepare` wrote (source=vision_flan); null = in the cache folder."""
    train: str | None = None
    """Path of the training JSON (source=json; the mini data knows its own)."""
    heldout: str | None = None
    unseen: str | None = None
    images: str | None = None
    """Folder that the records' image paths are relative to."""
    metadata: str | None = None
    """JSON with the task definitions."""
    tasks: list[str] | None = None
    """Only these tasks; null = all."""
    max_per_task: int | None = None
    """At most so many training records of each task, sampled with the seed; null = all."""
    max_length: int = 1792
    """Tokens of one instance, image tokens included; longer ones lose the end of their last answer."""
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        _require(self.tasks != [], "data.tasks", "[]", "must name at least one task, or be null for all")
        _require(self.max_length >= 16, "data.max_length", self.max_length, "must be >= 16")
        _require(
            self.max_per_task is None or self.max_per_task > 0,
            "data.max_per_task",
            self.max_per_task,
            "must be > 0",
        )
        _require(
            self.source != "json" or bool(self.train or self.heldout or self.unseen),
            "data.train",
            self.train,
            "data=json needs data.train=<annotation.json> (and data.images=<folder>)",
        )


@dataclass(frozen=True)
class OptimConfig:
    """The training loop's numbers (key `train`); defaults follow the paper, App. B, where it gives them."""

    epochs: float = 1.0
    steps: int | None = None
    """Optimizer steps; overrides `epochs` when set."""
    batch_size: int = 16
    """Instances per device and forward pass."""
    accumulation: int = 1
    effective_batch: int | None = None
    """Instances per optimizer step over all devices; accumulation follows from it. null = `accumulation` as given."""
    learning_rate: float = 4e-5
    scheduler: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` takes bf16 where the processor multiplies bf16 matrices in hardware, else fp32."""
    gradient_checkpointing: bool = False
    group_by_length: bool = True
    cache_features: bool = True
    """Compute the frozen vision tower once per picture and keep the result on disk."""
    log_every: int = 10
    save_every: int = 100
    keep_checkpoints: int = 2
    workers: int = 0

    def __post_init__(self) -> None:
        _require(self.steps is None or self.steps > 0, "train.steps", self.steps, "must be > 0 or null")
        _require(self.epochs > 0, "train.epochs", self.epochs, "must be > 0")
        _require(self.batch_size > 0, "train.batch_size", self.batch_size, "must be > 0")
        _require(self.accumulation > 0, "train.accumulation", self.accumulation, "must be > 0")
        _require(
            self.effective_batch is None or self.effective_batch > 0,
            "train.effective_batch",
            self.effective_batch,
            "must be > 0 or null",
        )
        _require(
            self.effective_batch is None or self.accumulation == 1,
            "train.accumulation",
            self.accumulation,
            "follows from train.effective_batch; give one of the two",
        )
        _require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "must be > 0")
        _require(0 <= self.warmup_ratio < 1, "train.warmup_ratio", self.warmup_ratio, "must be in [0, 1)")
        _require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "must be >= 0")
        _require(self.max_grad_norm > 0, "train.max_grad_norm", self.max_grad_norm, "must be > 0")
        _require(self.workers >= 0, "train.workers", self.workers, "must be >= 0")
        _require(self.log_every > 0, "train.log_every", self.log_every, "must be > 0")
        _require(self.save_every > 0, "train.save_every", self.save_every, "must be > 0")
        _require(self.keep_checkpoints > 0, "train.keep_checkpoints", self.keep_checkpoints, "must be > 0")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases tracking."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "mixlora"
    name: str | None = None


@dataclass(frozen=True)
class DeepspeedConfig:
    """DeepSpeed (group `deepspeed`): the JSON configuration handed to the Trainer, or nothing."""

    name: str = "none"
    config: dict[str, object] | None = None


def _check_pool(rank: int, factors: int, adapter: AdapterConfig) -> None:
    _require(rank >= 1, "rank", rank, "must be >= 1")
    _require(factors >= 1, "factors", factors, "must be >= 1")
    _require(
        adapter.name != "mixlora" or rank <= factors,
        "rank",
        rank,
        f"must be <= factors={factors}, because rank factors are selected out of the pool",
    )


def _check_seed(seed: int) -> None:
    _require(0 <= seed < 2**32, "seed", seed, "must be in [0, 2^32)")


def _check_heeded(routing: RoutingConfig) -> None:
    for key, heeded_by in _HEEDED_BY.items():
        value, usual = getattr(routing, key), getattr(RoutingConfig, key)
        _require(
            routing.name in heeded_by or value == usual,
            f"routing.{key}",
            value,
            f"of no effect with routing={routing.name}; add routing=instance, or leave {usual}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `mixlora train` reads."""

    model: ModelConfig
    adapter: AdapterConfig
    routing: RoutingConfig
    data: DataConfig
    train: OptimConfig
    rank: int
    factors: int
    output_dir: str
    seed: int = 0
    resume: str | None = None
    """`auto` continues from the newest checkpoint in output_dir, a path from that checkpoint; null starts new."""
    overwrite: bool = False
    wandb: WandbConfig = field(default_factory=WandbConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        _check_pool(self.rank, self.factors, self.adapter)
        _check_seed(self.seed)
        if self.adapter.name == "mixlora":
            _check_heeded(self.routing)
        _require(
            self.adapter.name != "mixlora"
            or self.routing.balance_loss == 0
            or self.adapter.router_grad != "none",
            "routing.balance_loss",
            self.routing.balance_loss,
            "the routers get no gradient with adapter.router_grad=none; "
            "give adapter.router_grad=straight_through, or routing.balance_loss=0",
        )
        _require(
            self.adapter.name != "none" or self.model.train_projector,
            "adapter",
            self.adapter.name,
            "trains nothing; choose lora, mixlora or full (the untuned base: `mixlora eval adapter=none`)",
        )


@dataclass(frozen=True)
class GenerationConfig:
    """How `mixlora eval` answers (key `eval`)."""

    batch_size: int = 16
    max_new_tokens: int = 24
    limit: int | None = None
    """At most so many instances of each benchmark or task, a seeded sample; null = all."""
    seen: bool = False
    """Also answer the held-out instances of the seen tasks."""
    benchmarks: list[str] | None = None
    """Only these; null = those of `sources` where it is given, else all that the data has. "paper" = its eight."""
    sources: dict[str, str] | None = None
    """Local copies of benchmarks (folder, parquet file) and YAML files of your own, by name; the rest: from the hub."""
    ocr_tokens: bool = False
    """Text-VQA: put the words that an OCR system read into the prompt."""
    cache_features: bool = True

    def __post_init__(self) -> None:
        _require(self.batch_size > 0, "eval.batch_size", self.batch_size, "must be > 0")
        _require(self.max_new_tokens > 0, "eval.max_new_tokens", self.max_new_tokens, "must be > 0")
        _require(self.limit is None or self.limit > 0, "eval.limit", self.limit, "must be > 0 or null")


@dataclass(frozen=True)
class EvalConfig:
    """Everything that `mixlora eval` reads."""

    model: ModelConfig
    adapter: AdapterConfig
    routing: RoutingConfig
    data: DataConfig
    eval: GenerationConfig
    output_dir: str
    run: str | None = None
    """Run folder of `mixlora train`, whose base, adapter and template are evaluated; null: the untuned base."""
    seed: int = 0
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Who judges the answers once they are there, beside each benchmark's own rule."""

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        _require(
            self.run is not None or self.adapter.name == "none",
            "run",
            self.run,
            "give run=<folder of a finished `mixlora train`>, or adapter=none to score the untuned base",
        )


@dataclass(frozen=True)
class AlignConfig:
    """Everything that `mixlora align` reads: stage one of the small model, picture -> caption."""

    output_dir: str
    seed: int = 0
    start: str | None = None
    """Stage-one file to go on from; None = a random projector and the language model as its package has it."""
    pictures: int = 8_000
    """Caption pictures to draw."""
    questions: int = 0
    """Short questions asked about each picture, in turns of one conversation; 0 = captions alone."""
    lexical_steps: int = 500
    """Steps in which the projector alone maps picture cells to the embeddings of words that describe them; 0 = none."""
    lexical_batch_size: int = 128
    lexical_learning_rate: float = 2e-3
    steps: int = 500
    """Caption steps: projector and a low-rank update of the language model, through the whole model."""
    batch_size: int = 16
    learning_rate: float = 1e-3
    rank: int = 8
    """Rank of the language model's update, which is merged when the base is built."""
    warmup_ratio: float = 0.03
    log_every: int = 10
    save_every: int = 50
    check_pictures: int = 200
    """Held-out pictures that the finished base captions, to count the names it gets right."""

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        whole = (
            "pictures",
            "lexical_batch_size",
            "steps",
            "batch_size",
            "rank",
            "log_every",
            "save_every",
        )
        for key in (*whole, "learning_rate", "lexical_learning_rate"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "must be > 0")
        for key in ("questions", "lexical_steps"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "must be >= 0")
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "must be in [0, 1)")
