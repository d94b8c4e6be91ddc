"""Groups of keys that several commands share. What a key means is said beside it in conf/, defaults included."""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from mixlora_cli.config.settings import (
    AnyPrecision,
    Checkpoint,
    File,
    Flag,
    Folder,
    Integer,
    Mixture,
    NotNegative,
    NotNegativeNumber,
    Positive,
    PositiveNumber,
    Settings,
    Share,
    Text,
    rule,
)
from mixlora_cli.data.template import TEMPLATES
from mixlora_cli.routers import ROUTERS

AdapterName = Literal["lora", "mixlora", "full", "none"]
Quantization = Literal["none", "nf4", "int8"]


def _a_router(name: str) -> str:
    if name not in ROUTERS:
        raise PydanticCustomError("rule", "{allowed}", {"allowed": f"must be one of {', '.join(ROUTERS)}"})
    return name


RoutingName = Annotated[Text, AfterValidator(_a_router)]


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _is_template(name: str) -> bool:
    return name in TEMPLATES or Path(name).expanduser().is_file()


_TEMPLATES = f"must be one of {', '.join(TEMPLATES)}, or a Jinja file"


class ModelConfig(Settings, at="model"):
    """The base model (group `model`): it reads pictures and text, or text alone."""

    name: Text
    source: Literal["mini", "tiny", "smollm", "hub", "prepared"]
    name_or_path: Checkpoint | None = None
    revision: Text | None = None
    billions: PositiveNumber | None = None
    chat_template: Annotated[Text, rule(_TEMPLATES, _is_template)] | None = None
    template_options: dict[Text, Any] | None = None
    picture_options: dict[Text, Any] | None = None
    attn_implementation: Text = "eager"
    train_also: list[Annotated[Text, rule("must be regular expressions", _is_regex)]] = field(
        default_factory=list
    )
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        self.require(
            self.source != "hub" or self.name_or_path,
            "name_or_path",
            "model=hf needs a Hugging Face id or a local folder with a checkpoint",
        )
        self.require(
            not self.picture_options or self.source in ("hub", "prepared"),
            "picture_options",
            f"model={self.name} prepares pictures in one way; only null",
        )
        self.require(
            self.quantization == "none" or self.source != "tiny",
            "quantization",
            "model=tiny is made in memory, and only what is loaded can be quantised; give another model, or none",
        )


class AdapterConfig(Settings, at="adapter"):
    """What is trained (group `adapter`): PEFT's LoRA, MixLoRA, all language-model weights, or nothing."""

    name: AdapterName
    alpha: PositiveNumber | None = None
    dropout: Share = 0.05
    cfs: Literal["paper", "released", "none"] = "paper"
    router_grad: Literal["none", "straight_through"] = "none"
    pairing: Literal["separate", "tied"] = "separate"
    target_modules: Annotated[Text, rule("must be a regular expression", _is_regex)] | None = None


class RoutingConfig(Settings, at="routing"):
    """How MixLoRA picks its factors (group `routing`)."""

    name: RoutingName
    pool: Literal["all", "prompt", "text"] = "all"
    normalize: Flag = False
    router_init: Literal["random", "clusters", "tasks"] = "random"
    per: Literal["layer", "block"] = "layer"
    decode: Literal["prefill", "step"] = "prefill"
    encoder: Checkpoint | None = None
    balance_loss: NotNegativeNumber = 0.0
    health_every: Annotated[Integer, rule("must be >= 0; 0 = never", lambda steps: steps >= 0)] = 50

    def __post_init__(self) -> None:
        reasons = {
            "encoder": f"routing={self.name} reads no task definitions; only null",
            "balance_loss": f"routing={self.name} has no routers to balance; only 0",
        }
        for key, reason in reasons.items():
            usual = key in ROUTERS[self.name].heeds or getattr(self, key) == getattr(RoutingConfig, key)
            self.require(usual, key, reason)

    def require_heeded(self) -> None:
        """Raise ValueError for a key that a MixLoRA with this routing would not heed."""
        for key in ("pool", "normalize", "router_init", "per", "decode"):
            value, usual = getattr(self, key), getattr(RoutingConfig, key)
            self.require(
                key in ROUTERS[self.name].heeds or value == usual,
                key,
                f"of no effect with routing={self.name}; add routing=instance, or leave {usual}",
            )


class DataConfig(Settings, at="data"):
    """Training and evaluation records (group `data`), and how they are read."""

    name: Text
    source: Literal["mini", "mini_text", "json", "vision_flan"]
    root: Text | None = None
    train: Mixture | None = None
    heldout: Mixture | None = None
    unseen: Mixture | None = None
    images: Folder | None = None
    metadata: File | None = None
    task_key: Text | None = None
    streaming: Flag = False
    tasks: Annotated[list[Text], rule("must name at least one task, or be null for all", bool)] | None = None
    max_per_task: Positive | None = None
    max_length: Annotated[Integer, Field(ge=16)] = 1792
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        self.require(
            self.source != "json" or self.train or self.heldout or self.unseen,
            "train",
            "data=json needs data.train=<annotation.json> (and data.images=<folder>)",
        )
        for split in ("heldout", "unseen"):
            given = getattr(self, split)
            weighted = isinstance(given, dict) and any(isinstance(entry, dict) for entry in given.values())
            self.require(not weighted, split, "weights are for data.train alone; only {task: file}")
        self.require(
            not self.streaming or (self.source == "json" and self.train),
            "streaming",
            "only records of your own are streamed; give data=json data.train=<file.jsonl, folder or hub name>",
        )
        self.require(
            not self.streaming or self.max_per_task is None,
            "max_per_task",
            "data.streaming=true reads records as they come and cannot draw from them all; only null",
        )

    @property
    def is_built_in(self) -> bool:
        """Whether the data is made on first use and has every split, with definitions."""
        return self.source in ("mini", "mini_text")


class DeepspeedConfig(Settings, at="deepspeed"):
    """DeepSpeed (group `deepspeed`): the JSON configuration handed to the Trainer, or nothing."""

    name: Text = "none"
    config: dict[Text, object] | None = None

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 without."""
        zero: Any = (self.config or {}).get("zero_optimization") or {}
        return int(zero.get("stage", 0))


def _is_host_and_port(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 2**16


class LaunchConfig(Settings, at="launch"):
    """Processes and nodes; where torchrun, deepspeed or SLURM has started the processes, they decide instead."""

    nproc: Positive | None = None
    nnodes: Positive = 1
    rdzv_endpoint: Text | None = None

    def __post_init__(self) -> None:
        self.require(
            self.rdzv_endpoint is None or _is_host_and_port(self.rdzv_endpoint),
            "rdzv_endpoint",
            "must be host:port, such as node01:29500",
        )
        self.require(
            self.nnodes == 1 or self.rdzv_endpoint,
            "rdzv_endpoint",
            f"launch.nnodes={self.nnodes} needs a host:port where the nodes meet, the same on each of them",
        )


class WandbConfig(Settings, at="wandb"):
    """Weights & Biases tracking."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: Text = "mixlora"
    name: Text | None = None


class JudgeConfig(Settings, at="judge"):
    """Who judges the stored answers, and how it is asked (group `judge`)."""

    name: Literal["none", "exact", "hf", "openai"] = "none"
    model: Text | None = None
    revision: Text | None = None
    max_new_tokens: Positive = 8
    batch_size: Positive = 16
    precision: AnyPrecision = "auto"
    base_url: Text = "http://localhost:8000/v1"
    api: Literal["completions", "chat"] = "completions"
    concurrency: Positive = 16
    timeout: PositiveNumber = 60.0
    retries: NotNegative = 5
    first_wait: NotNegativeNumber = 1.0
    on_refusal: Literal["stop", "unparsed"] = "stop"
    extra: dict[Text, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needs_model = self.name in ("hf", "openai")
        self.require(self.model or not needs_model, "model", "name the judging model")
