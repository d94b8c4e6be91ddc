"""The few numbers of a model and its adapter that memory and operations follow from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mixlora_cli.config import AdapterConfig, RoutingConfig
from mixlora_cli.models.tower import STRIDE


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder layer."""

    name: str
    """Last part of its name: `q_proj`."""
    inputs: int
    outputs: int
    adapted: bool

    @property
    def products(self) -> int:
        """Multiplications for one token."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Update:
    """The low-rank update of the adapted layers."""

    rank: int
    factors: int
    dropout: bool
    fused: bool
    """Taken along with the frozen layer's product (MixLoRA), not beside it (LoRA)."""
    routed: bool
    """Routers choose its factors (MixLoRA, not by chance)."""
    conditional: bool
    """With a conditional router (CFS)."""
    router_width: int | None
    """What routers read: None = the layer's own input."""
    routers_learn: bool

    def router_products(self, linear: Linear) -> int:
        """Multiplications for one instance: Eq. 6 for A and B, Eq. 7 for the conditional router."""
        if not self.routed:
            return 0
        width = linear.inputs if self.router_width is None else self.router_width
        return 2 * width * self.factors + self.conditional * self.rank * linear.inputs * self.factors


@dataclass(frozen=True)
class Network:
    """A LLaVA-class model whose decoder layers are all alike, and what is trained on it."""

    num_layers: int
    linears: tuple[Linear, ...]
    """Of one decoder layer."""
    hidden: int
    intermediate: int
    attention: int
    """Width of all query heads together; keys and values are repeated to it."""
    num_heads: int
    vocabulary: int
    image_tokens: int
    tower_parameters: int
    tower_tokens: int
    """Picture positions that the tower works on."""
    tower_width: int
    """Features of a position, as the projector reads them."""
    projector_parameters: int
    trains_base: bool
    """All weights of the language model (`adapter=full`)."""
    trains_projector: bool
    update: Update | None
    eager_attention: bool

    @property
    def trains_before_layers(self) -> bool:
        """Whether anything before the first decoder layer is trained; if not, backward ends inside that layer."""
        return self.trains_base or self.trains_projector


def read_network(
    skeleton: PreTrainedModel,
    adapter: AdapterConfig,
    routing: RoutingConfig,
    rank: int,
    factors: int,
    train_projector: bool,
    attn_implementation: str,
) -> Network:
    """Read the sizes off a model without adapter, on any device."""
    config: Any = skeleton.config
    text = config.text_config
    base: Any = skeleton.model
    tower, projector = base.vision_tower, base.multi_modal_projector
    side = config.vision_config.image_size // getattr(config.vision_config, "patch_size", STRIDE)
    return Network(
        num_layers=text.num_hidden_layers,
        linears=_linears(skeleton, adapter),
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        attention=text.num_attention_heads * _head_width(text),
        num_heads=text.num_attention_heads,
        vocabulary=text.vocab_size,
        image_tokens=config.image_seq_length,
        tower_parameters=sum(p.numel() for p in tower.parameters()),
        tower_tokens=int(side**2),
        tower_width=next(projector.parameters()).shape[-1],
        projector_parameters=sum(p.numel() for p in projector.parameters()),
        trains_base=adapter.name == "full",
        trains_projector=train_projector,
        update=_update(adapter, routing, rank, factors, text.hidden_size),
        eager_attention=attn_implementation == "eager",
    )


def _head_width(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _linears(skeleton: PreTrainedModel, adapter: AdapterConfig) -> tuple[Linear, ...]:
    """Linear layers of the first decoder layer; all layers of a decoder are alike."""
    first = re.compile(r".*language_model\.layers\.0\..*")
    adapts = re.compile(adapter.target_modules) if adapter.name in ("lora", "mixlora") else None
    return tuple(
        Linear(
            name.rpartition(".")[2],
            module.in_features,
            module.out_features,
            adapts is not None and bool(adapts.fullmatch(name)),
        )
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and first.fullmatch(name)
    )


def _update(
    adapter: AdapterConfig, routing: RoutingConfig, rank: int, factors: int, hidden: int
) -> Update | None:
    if adapter.name not in ("lora", "mixlora"):
        return None
    routed = adapter.name == "mixlora" and routing.name != "random"
    return Update(
        fused=adapter.name == "mixlora",
        rank=rank,
        factors=factors,
        dropout=adapter.dropout > 0,
        routed=routed,
        conditional=routed and adapter.cfs == "paper",
        router_width=hidden if routing.name == "task" else None,
        routers_learn=adapter.router_grad == "straight_through",
    )
