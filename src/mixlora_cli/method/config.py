"""The method's configuration as PEFT stores it in `adapter_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, get_args

from peft import PeftConfig

from mixlora_cli.routers import ROUTERS, Router


class MixLoraType(str, Enum):
    """The method's place in PEFT's tables: as `peft.PeftType`, a string that also has a `value`.

    That enumeration itself is closed; PEFT and transformers only ever look a type up and print its `value`.
    """

    MIXLORA = "MIXLORA"


PEFT_TYPE = MixLoraType.MIXLORA

ConditionalSelection = Literal["paper", "released", "none"]
RouterGrad = Literal["none", "straight_through"]
Pairing = Literal["separate", "tied"]
RouterInit = Literal["random", "clusters", "tasks"]
Per = Literal["layer", "block"]
Pool = Literal["all", "prompt", "text"]
Decode = Literal["prefill", "step"]


@dataclass
class MixLoraConfig(PeftConfig):
    """Conditional mixture of LoRA (Shen et al., ACL 2024).

    Raises:
        ValueError: a field is out of range; names the field, its value and what is allowed.
    """

    r: int = field(default=4, metadata={"help": "Rank r: factors selected out of each pool for an instance."})
    factors: int = field(default=16, metadata={"help": "E: factors in each pool."})
    alpha: float | None = field(
        default=None,
        metadata={"help": "The update is scaled by alpha / r; null = 2 * factors (paper, App. B)."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the low-rank product."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Regular expression that matches a linear layer's whole name, or a list of name endings."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers left alone although target_modules matches them."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the blocks that are adapted; null = all of them."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of blocks that layers_to_transform counts; null = any."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "False: B starts with random numbers too, so that an untrained adapter changes outputs."
        },
    )
    rank_pattern: dict[str, int] | None = field(
        default=None, metadata={"help": "Refused: all layers select the same number r of their factors."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules that are trained whole and saved with the adapter."}
    )
    cfs: ConditionalSelection = field(
        default="paper",
        metadata={
            "help": "Conditional factor selection: Eq. 7; as the published code computes it; or without."
        },
    )
    router_grad: RouterGrad = field(
        default="none",
        metadata={
            "help": "none: the routers keep their initial values, as published; straight_through: they learn."
        },
    )
    pairing: Pairing = field(
        default="separate",
        metadata={
            "help": "separate: A and B have routers of their own; tied: B gets A's selection, without CFS."
        },
    )
    routing: str = field(
        default="instance",
        metadata={"help": "What selects the factors: the layer's input, the task's text, chance."},
    )
    pool: Pool = field(
        default="all",
        metadata={
            "help": "Tokens that an instance's description averages; prompt = without loss; text = those of the "
            "prompt that stand for no picture."
        },
    )
    picture_tokens: list[int] | None = field(
        default=None,
        metadata={
            "help": "pool=text: ids of tokens that stand for pictures; null = those of the model's config."
        },
    )
    normalize: bool = field(
        default=False,
        metadata={
            "help": "Routers read the description centred and scaled by statistics that `calibrate` takes once."
        },
    )
    router_init: RouterInit = field(
        default="random",
        metadata={
            "help": "tasks: routers start so that the descriptions that `calibrate` reads select alike where they are "
            "of one task; clusters: where k-means finds them together."
        },
    )
    per: Per = field(
        default="layer",
        metadata={
            "help": "layer: each layer selects; block: the first of a block selects for all of its layers."
        },
    )
    decode: Decode = field(
        default="prefill",
        metadata={"help": "prefill: the prompt's factors stay for the answer; step: re-route."},
    )
    task_embedding_dim: int | None = field(
        default=None,
        metadata={"help": "routing=task: width of the embeddings; null = the model's hidden size."},
    )
    task_encoder: str | None = field(
        default=None,
        metadata={
            "help": "routing=task: language model that made the embeddings; null = the model's own, unadapted."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # as LoRA's, without doubles
        _require(self.r >= 1, "r", self.r, "must be >= 1")
        _require(self.factors >= 1, "factors", self.factors, "must be >= 1")
        _require(
            self.r <= self.factors, "r", self.r, f"must be <= factors={self.factors}: r of them are selected"
        )
        _require(
            self.alpha is None or self.alpha > 0, "alpha", self.alpha, "must be > 0, or null for 2 * factors"
        )
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1)")
        _require(
            self.task_embedding_dim is None or self.task_embedding_dim >= 1,
            "task_embedding_dim",
            self.task_embedding_dim,
            "must be >= 1, or null for the model's hidden size",
        )
        _require(
            self.router_init == "random" or self.normalize,
            "router_init",
            self.router_init,
            "needs normalize=True, whose descriptions it starts from",
        )
        _require(
            not self.rank_pattern,
            "rank_pattern",
            self.rank_pattern,
            "cannot be had: r of E factors are selected in every layer, and alpha / r scales them all alike; set r, "
            "or adapt fewer layers with target_modules or layers_to_transform",
        )
        listed = self.target_modules is None or not isinstance(self.target_modules, str)
        _require(
            self.layers_to_transform is None or listed,
            "layers_to_transform",
            self.layers_to_transform,
            "goes with a list of target_modules; a regular expression names the blocks itself",
        )
        _require(
            not self.layers_pattern or self.layers_to_transform is not None,
            "layers_pattern",
            self.layers_pattern,
            "goes with layers_to_transform",
        )
        for key, allowed in {**_CHOICES, "routing": tuple(ROUTERS)}.items():
            value = getattr(self, key)
            _require(value in allowed, key, value, f"must be one of {', '.join(allowed)}")
        for key in _OF_TOKENS if self.router.source != "tokens" else ():
            usual = type(self).__dataclass_fields__[key].default
            value = getattr(self, key)
            _require(
                value == usual, key, value, f"goes with routing=instance; routing={self.routing} has {usual}"
            )
        for key in _OF_ROUTERS if self.router.reads is None else ():
            usual = type(self).__dataclass_fields__[key].default
            value = getattr(self, key)
            _require(value == usual, key, value, f"needs routers, which routing={self.routing} has not")

    @property
    def router(self) -> Router:
        """What selects the factors."""
        return ROUTERS[self.routing]

    @property
    def scaling(self) -> float:
        """The update's scale alpha / r."""
        return (2 * self.factors if self.alpha is None else self.alpha) / self.r


_OF_TOKENS = ("normalize", "router_init", "per")
"""Fields that only a selection by tokens heeds."""
_OF_ROUTERS = ("pairing",)
"""Fields that only an adapter with routers heeds."""
_CHOICES: dict[str, tuple[str, ...]] = {
    "cfs": get_args(ConditionalSelection),
    "router_grad": get_args(RouterGrad),
    "pairing": get_args(Pairing),
    "router_init": get_args(RouterInit),
    "per": get_args(Per),
    "pool": get_args(Pool),
    "decode": get_args(Decode),
}


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value}: {allowed}")
