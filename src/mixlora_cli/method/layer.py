"""A linear layer with pools of low-rank factors, of which each instance gets its own few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.context import RoutingContext
from mixlora_cli.method.description import Describe, choose_description
from mixlora_cli.method.factors import ConditionalRouter, FactorPool
from mixlora_cli.method.lowrank import adapted_linear, adapted_linear_of_rows, add_low_rank, is_plain
from mixlora_cli.method.reading import Kept
from mixlora_cli.method.selection import (
    Selection,
    conditional_logits,
    conditional_logits_released,
    conditional_scores,
    fused_probabilities,
    independent_probabilities,
    load_balance,
    random_factors,
    seeded_factors,
    straight_through_weight,
    stream_of,
    top_factors,
)

CANNOT_MERGE = (
    "MixLoRA cannot be merged into the base weights: which factors update them depends on the input, so no single "
    "matrix gives the same outputs. Keep the adapter beside the base"
)
ROUTERS = ("mixlora_router_a", "mixlora_router_b", "mixlora_router_ab")
_CONTRACTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "paper": conditional_logits,
    "released": conditional_logits_released,
}


@dataclass(frozen=True)
class _Rule:
    """How one adapter of a layer picks and applies its factors; made of the configuration once."""

    num_factors: int
    rank: int
    scaling: float
    dropout: float
    learns: bool
    """Routers get a gradient (straight-through)."""
    keeps: bool
    """The prompt's selection stays for the answer."""
    describe: Describe | None
    """What the routers read; None = there are no routers, chance selects."""


class MixLoraLayer(BaseTunerLayer):
    """Parameters by adapter name: pools `factors_a` (E, d_in) and `factors_b` (E, d_out), routers (E, width), W_AB."""

    # PEFT finds a method's weights by this prefix in their names.
    adapter_layer_names = ("mixlora_factors_a", "mixlora_factors_b", *ROUTERS)
    other_param_names = ("rules", "last_selection", "mixlora_dropout")

    def __init__(self, base_layer: nn.Linear, context: RoutingContext, name: str = "") -> None:
        self.base_layer = base_layer
        self.stream = stream_of(name)
        self.context = context
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.mixlora_factors_a = nn.ModuleDict()
        self.mixlora_factors_b = nn.ModuleDict()
        self.mixlora_router_a = nn.ModuleDict()
        self.mixlora_router_b = nn.ModuleDict()
        self.mixlora_router_ab = nn.ModuleDict()
        self.mixlora_dropout = nn.ModuleDict()
        self.rules: dict[str, _Rule] = {}
        self.last_selection: dict[str, Selection | None] = {}
        """By adapter: the factors of the last forward pass's instances, without a graph; None before the first."""
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: MixLoraConfig) -> None:
        """Add the parameters of a new adapter, initialised so that it changes nothing."""
        width = self.in_features
        if config.routing == "task":
            assert config.task_embedding_dim is not None  # the model fills it in
            width = config.task_embedding_dim
        self.rules[adapter_name] = _Rule(
            num_factors=config.factors,
            rank=config.r,
            scaling=config.scaling,
            dropout=config.dropout,
            learns=config.router_grad == "straight_through",
            keeps=config.decode == "prefill",
            describe=choose_description(config),
        )
        # Its key is there from the start: a new one would make `torch.compile` begin again.
        self.last_selection[adapter_name] = None
        self.mixlora_factors_a[adapter_name] = FactorPool(config.factors, self.in_features).init_like_lora()
        self.mixlora_factors_b[adapter_name] = FactorPool(config.factors, self.out_features)
        self.mixlora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        if config.routing != "random":
            self.mixlora_router_a[adapter_name] = nn.Linear(width, config.factors, bias=False)
            self.mixlora_router_b[adapter_name] = nn.Linear(width, config.factors, bias=False)
            if config.cfs != "none":
                self.mixlora_router_ab[adapter_name] = ConditionalRouter(
                    config.r, self.in_features, config.factors, _CONTRACTIONS[config.cfs]
                )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; their weights require gradients, but routers that get none never do.

        Otherwise an optimizer would keep state for them, and data parallel training would wait for their gradients.
        """
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_routers()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch gradients of adapters; see `set_adapter`."""
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._freeze_routers()

    def _freeze_routers(self) -> None:
        for name, rule in self.rules.items():
            if not rule.learns:
                for routers in (getattr(self, attribute) for attribute in ROUTERS):
                    if name in routers:
                        routers[name].requires_grad_(False)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse.

        Raises:
            NotImplementedError: always, with the reason.
        """
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> NoReturn:
        """Refuse: nothing was ever merged.

        Raises:
            NotImplementedError: always, with the reason.
        """
        raise NotImplementedError(CANNOT_MERGE)


class MixLoraLinear(nn.Module, MixLoraLayer):
    """y = W h + (alpha / r) B A h with A and B selected for each instance (Eq. 6, 8, 9)."""

    def __init__(
        self,
        base_layer: nn.Linear,
        adapter_name: str,
        config: MixLoraConfig,
        context: RoutingContext,
        name: str = "",
    ) -> None:
        """`name` is the layer's in the model, which tells its random draws from other layers'."""
        super().__init__()
        MixLoraLayer.__init__(self, base_layer, context, name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (B, ..., d_in) to (B, ..., d_out); the first dimension counts instances, the others their tokens."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.rules]
        if names and not (args or kwargs) and is_plain(self.base_layer, hidden):
            output = self._adapted(names.pop(0), hidden)
        else:
            output = self.base_layer(hidden, *args, **kwargs)
        for name in names:
            dropped, chosen = self.mixlora_dropout[name](hidden), self._chosen(name, hidden)
            rows, weight = self._rows(name, chosen), chosen.selection.weight
            output = add_low_rank(output, dropped, *rows, self.rules[name].scaling, weight)
        return output

    def _adapted(self, name: str, hidden: Tensor) -> Tensor:
        """Base layer and update in one step."""
        chosen, rule = self._chosen(name, hidden), self.rules[name]
        dropout = rule.dropout if self.training else 0.0
        if not torch.is_grad_enabled() and not dropout:
            return adapted_linear_of_rows(self.base_layer, hidden, *self._rows(name, chosen), rule.scaling)
        pool_a, pool_b = self.mixlora_factors_a[name], self.mixlora_factors_b[name]
        assert isinstance(pool_a, FactorPool) and isinstance(pool_b, FactorPool)
        return adapted_linear(
            self.base_layer, hidden, pool_a.weight, pool_b.weight, chosen.selection, rule.scaling, dropout
        )

    def _chosen(self, name: str, hidden: Tensor) -> Kept:
        """The factors of these instances: those of their prompt if they go on with one, else newly selected."""
        rule, reading, key = self.rules[name], self.context.reading, (id(self), name)
        if rule.keeps and reading.continues:
            kept = reading.kept.get(key)
            if kept is not None:
                return kept
        selection = self._select(name, rule, hidden)
        reading.kept[key] = kept = Kept(selection.without_gradient())
        self.last_selection[name] = kept.selection
        return kept if selection.weight is None else Kept(selection)

    def _rows(self, name: str, chosen: Kept) -> tuple[Tensor, Tensor]:
        """The selected factors (B, r, d_in) and (B, r, d_out); looked up once for an answer, which has many passes."""
        if chosen.rows is not None and not torch.is_grad_enabled():
            return chosen.rows
        rows_a: Tensor = self.mixlora_factors_a[name](chosen.selection.index_a)
        rows_b: Tensor = self.mixlora_factors_b[name](chosen.selection.index_b)
        if self.rules[name].keeps and self.context.generating and not torch.is_grad_enabled():
            dtype = self.base_layer.weight.dtype
            chosen.rows = rows_a.to(dtype), rows_b.to(dtype)
        return rows_a, rows_b

    def _select(self, name: str, rule: _Rule, hidden: Tensor) -> Selection:
        if rule.describe is None:
            return self._select_by_chance(rule, hidden)
        learning = rule.learns and torch.is_grad_enabled()
        # Near-ties must fall the same way whatever type the layer computes in.
        with torch.set_grad_enabled(learning), torch.autocast(hidden.device.type, enabled=False):
            return self._select_by_routers(
                name, rule, rule.describe(self.context, hidden, self.training), learning
            )

    def _select_by_chance(self, rule: _Rule, hidden: Tensor) -> Selection:
        if self.context.reading.seeds is not None:
            return self._select_by_seeds(rule, hidden, self.context.reading.seeds)
        copies = self.context.reading.copies
        # Beams of one input swap their histories, so they must share their factors.
        index_a, index_b = (
            random_factors(len(hidden) // copies, rule.num_factors, rule.rank, hidden.device)
            for _ in range(2)
        )
        return Selection(index_a.repeat_interleave(copies, dim=0), index_b.repeat_interleave(copies, dim=0))

    def _select_by_seeds(self, rule: _Rule, hidden: Tensor, seeds: Tensor) -> Selection:
        if len(seeds) != len(hidden):
            raise ValueError(
                f"routing_seeds={tuple(seeds.shape)}: expected one for each instance, ({len(hidden)},)"
            )
        # A and B of each pass have their own draws; under decode=prefill only the first pass draws.
        first = self.stream + 2 * self.context.reading.step
        index_a, index_b = (
            seeded_factors(seeds.to(hidden.device), first + side, rule.num_factors, rule.rank)
            for side in range(2)
        )
        return Selection(index_a, index_b)

    def _select_by_routers(self, name: str, rule: _Rule, description: Tensor, learning: bool) -> Selection:
        """Eq. 6 for A, Eq. 8 (Eq. 6 without CFS) for B, from what the routers read (B, width)."""
        p_a = independent_probabilities(_logits(self.mixlora_router_a[name], description))
        p_b = independent_probabilities(_logits(self.mixlora_router_b[name], description))
        index_a = top_factors(p_a, rule.rank)
        if name in self.mixlora_router_ab:
            logits = self.mixlora_router_ab[name](self.mixlora_factors_a[name](index_a))
            p_b = fused_probabilities(p_b, conditional_scores(logits))
        index_b = top_factors(p_b, rule.rank)
        if not learning:
            return Selection(index_a, index_b)
        if self.context.collect_balance:
            # p_B of Eq. 8 is a sum of two distributions.
            share_b = p_b / p_b.detach().sum(dim=-1, keepdim=True)
            self.context.balance_terms += [load_balance(p_a, index_a), load_balance(share_b, index_b)]
        weight = straight_through_weight(p_a, index_a) * straight_through_weight(p_b, index_b)
        return Selection(index_a, index_b, weight)

    def __repr__(self) -> str:
        return "mixlora." + super().__repr__()


def _logits(router: nn.Module, description: Tensor) -> Tensor:
    """fp32 logits (B, E) of a router whose weights may be in another type (DeepSpeed's bf16 casts them)."""
    weight: Tensor = router.weight  # type: ignore[assignment]
    logits: Tensor = router(description.to(weight.dtype))
    return logits.float()
