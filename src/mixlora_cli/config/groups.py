"""Groups of keys that several commands share. What a key means is said beside it in conf/, defaults included."""

from __future__ import annotations

import re
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mixlora_cli.config.settings import (
    AnyPrecision,
    Flag,
    Integer,
    NotNegative,
    NotNegativeNumber,
    Positive,
    PositiveNumber,
    Settings,
    Share,
    Text,
    require,
    rule,
)
from mixlora_cli.routers import ROUTERS

AdapterName = Literal["lora", "mixlora", "full", "none"]
if TYPE_CHECKING:
    RoutingName = str
else:
    RoutingName = Literal[tuple(ROUTERS)]


class ModelConfig(Settings, at="model"):
    """The base vision-language model (group `model`)."""

    name: Text
    source: Literal["mini", "tiny", "hub", "prepared"]
    name_or_path: Text | None = None
    """Hugging Face id or local folder; required for `source=hub`."""
    revision: Text | None = None
    template: Text = "v1"
    """Conversation template, a key of `data.template.TEMPLATES`; the same one trains and evaluates."""
    attn_implementation: Text = "eager"
    train_projector: Flag = False

    def __post_init__(self) -> None:
        require(
            self.source != "hub" or self.name_or_path,
            "model.name_or_path",
            self.name_or_path,
            "model=hf needs a Hugging Face id or a local folder of a LLaVA-class checkpoint",
        )


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


class AdapterConfig(Settings, at="adapter"):
    """What is trained (group `adapter`): PEFT's LoRA, MixLoRA, all language-model weights, or nothing."""

    name: AdapterName
    alpha: PositiveNumber | None = None
    """Numerator of the scale alpha / rank; default 2 * rank for LoRA, 2 * factors for MixLoRA (App. B)."""
    dropout: Share = 0.05
    cfs: Literal["paper", "released", "none"] = "paper"
    router_grad: Literal["none", "straight_through"] = "none"
    target_modules: Annotated[Text, rule("must be a regular expression", _is_regex)] = (
        r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    )
    """Regular expression that must match a module's whole name."""


class RoutingConfig(Settings, at="routing"):
    """How MixLoRA picks its factors (group `routing`)."""

    name: RoutingName
    pool: Literal["all", "prompt"] = "all"
    decode: Literal["prefill", "step"] = "prefill"
    encoder: Text | None = None
    """routing=task: the frozen language model that reads the task definitions; null = the base's own."""
    balance_loss: NotNegativeNumber = 0.0
    health_every: Annotated[Integer, rule("must be >= 0; 0 = never", lambda steps: steps >= 0)] = 50

    def __post_init__(self) -> None:
        reasons = {
            "encoder": f"routing={self.name} reads no task definitions; only null",
            "balance_loss": f"routing={self.name} has no routers to balance; only 0",
        }
        for key, reason in reasons.items():
            usual = key in ROUTERS[self.name].heeds or getattr(self, key) == getattr(RoutingConfig, key)
            require(usual, f"routing.{key}", getattr(self, key), reason)

    def require_heeded(self) -> None:
        """Raise ValueError for a key that a MixLoRA with this routing would not heed."""
        for key in ("pool", "decode"):
            value, usual = getattr(self, key), getattr(RoutingConfig, key)
            require(
                key in ROUTERS[self.name].heeds or value == usual,
                f"routing.{key}",
                value,
                f"of no effect with routing={self.name}; add routing=instance, or leave {usual}",
            )


class DataConfig(Settings, at="data"):
    """Training and evaluation records (group `data`): LLaVA-format JSON plus an image folder."""

    name: Text
    source: Literal["mini", "json", "vision_flan"]
    root: Text | None = None
    """Folder that `mixlora prepare` wrote (source=vision_flan); null = in the cache folder."""
    train: Text | None = None
    heldout: Text | None = None
    unseen: Text | None = None
    images: Text | None = None
    metadata: Text | None = None
    tasks: Annotated[list[Text], rule("must name at least one task, or be null for all", bool)] | None = None
    max_per_task: Positive | None = None
    max_length: Annotated[Integer, Field(ge=16)] = 1792
    """Tokens of one instance, image tokens included; longer ones lose the end of their last answer."""
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        require(
            self.source != "json" or self.train or self.heldout or self.unseen,
            "data.train",
            self.train,
            "data=json needs data.train=<annotation.json> (and data.images=<folder>)",
        )


class DeepspeedConfig(Settings, at="deepspeed"):
    """DeepSpeed (group `deepspeed`): the JSON configuration handed to the Trainer, or nothing."""

    name: Text = "none"
    config: dict[Text, object] | None = None


def _is_host_and_port(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 2**16


class LaunchConfig(Settings, at="launch"):
    """Processes and nodes; where torchrun, deepspeed or SLURM has started the processes, they decide instead."""

    nproc: Positive | None = None
    """Processes on each node; null = one for each visible GPU, one without a GPU."""
    nnodes: Positive = 1
    rdzv_endpoint: Text | None = None
    """host:port where the nodes meet; the host is one of them."""

    def __post_init__(self) -> None:
        require(
            self.rdzv_endpoint is None or _is_host_and_port(self.rdzv_endpoint),
            "launch.rdzv_endpoint",
            self.rdzv_endpoint,
            "must be host:port, such as node01:29500",
        )
        require(
            self.nnodes == 1 or self.rdzv_endpoint,
            "launch.rdzv_endpoint",
            self.rdzv_endpoint,
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
    """Hugging Face id or local folder (`hf`), or the name that the server knows (`openai`)."""
    revision: Text | None = None
    max_new_tokens: Positive = 8
    batch_size: Positive = 16
    """`hf`: questions that are read at once."""
    precision: AnyPrecision = "auto"
    base_url: Text = "http://localhost:8000/v1"
    api: Literal["completions", "chat"] = "completions"
    """`openai`: `completions` sends the prompt as it stands, `chat` leaves its format to the server."""
    concurrency: Positive = 16
    timeout: PositiveNumber = 60.0
    """`openai`: seconds without a sign of the server after which a request counts as failed."""
    retries: NotNegative = 5
    first_wait: NotNegativeNumber = 1.0
    """`openai`: seconds before the first further try; they double from there."""
    on_refusal: Literal["stop", "unparsed"] = "stop"
    """`openai`: what becomes of a question that the server calls wrong (HTTP 400, 413, 422)."""
    extra: dict[Text, Any] = field(default_factory=dict)
    """`openai`: further fields of the request's body; null takes one out."""

    def __post_init__(self) -> None:
        needs_model = self.name in ("hf", "openai")
        require(self.model or not needs_model, "judge.model", self.model, "name the judging model")
