"""A linear layer with pools of low-rank factors, of which each instance gets its own few."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mixlora_cli.method.config import MixLoraConfig, RouterInit
from mixlora_cli.method.context import RoutingContext
from mixlora_cli.method.factors import (
    ConditionalRouter,
    FactorPool,
    Standardiser,
    clusters,
    of_tasks,
)
from mixlora_cli.method.forward_info import CachedSelection, ForwardInfo
from mixlora_cli.method.lowrank import (
    adapted_linear,
    adapted_linear_of_rows,
    add_low_rank,
    add_low_rank_by_token,
    is_plain,
    is_unwatched,
)
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

if TYPE_CHECKING:
    from mixlora_cli.routers import RouterInput

CANNOT_MERGE = (
    "MixLoRA cannot be merged into the base weights: which factors update them depends on the input, so no single "
    "matrix gives the same outputs. Keep the adapter beside the base, or fit a static LoRA: mixlora export run=FOLDER"
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
    """Routers get a gradient."""
    tied: bool
    """B gets A's selection."""
    router_init: RouterInit
    """What the routers start as."""
    block: str
    """All of its layers get the selection of the one that holds the routers; "" = the layer selects for itself."""
    holder: str
    """That layer's name."""
    keeps: bool
    """The prompt's selection stays for the answer."""
    source: Literal["tokens", "task", "chance"]
    """What the choice depends on."""
    router_input: RouterInput | None
    """What the routers read; None = there are no routers, chance selects."""


class MixLoraLayer(BaseTunerLayer):
    """Parameters by adapter name: pools `factors_a` (E, d_in) and `factors_b` (E, d_out), routers (E, width), W_AB."""

    # PEFT finds a method's weights by this prefix in their names.
    adapter_layer_names = (
        "mixlora_factors_a",
        "mixlora_factors_b",
        *ROUTERS,
        "mixlora_standardiser",
    )
    other_param_names = ("rules", "last_selection", "mixlora_dropout")

    def __init__(self, base_layer: nn.Linear, context: RoutingContext, name: str = "") -> None:
        self.base_layer = base_layer
        self.name = name
        self.stream = stream_of(name)
        self.context = context
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.mixlora_factors_a = nn.ModuleDict()
        self.mixlora_factors_b = nn.ModuleDict()
        self.mixlora_router_a = nn.ModuleDict()
        self.mixlora_router_b = nn.ModuleDict()
        self.mixlora_router_ab = nn.ModuleDict()
        self.mixlora_standardiser = nn.ModuleDict()
        self.mixlora_dropout = nn.ModuleDict()
        self.rules: dict[str, _Rule] = {}
        self.last_selection: dict[str, Selection | None] = {}
        """By adapter: the factors of the last forward pass's instances, without a graph; None before the first."""
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: MixLoraConfig) -> None:
        """Add the parameters of a new adapter, initialised so that it changes nothing (`init_weights`)."""
        width = self.in_features
        if config.router.source == "task":
            assert config.task_embedding_dim is not None  # the model fills it in
            width = config.task_embedding_dim
        block, holder = "", self.name
        if config.per == "block":
            block = _block_of(self.name)
            holder = self.context.holders.setdefault((adapter_name, block), self.name)
        if config.pool == "text":
            known = {*(self.context.picture_tokens or ()), *(config.picture_tokens or ())}
            self.context.picture_tokens = tuple(sorted(known))
        self.rules[adapter_name] = _Rule(
            num_factors=config.factors,
            rank=config.r,
            scaling=config.scaling,
            dropout=config.dropout,
            learns=config.router_grad == "straight_through",
            tied=config.pairing == "tied",
            router_init=config.router_init,
            block=block,
            holder=holder,
            keeps=config.decode == "prefill",
            source=config.router.source,
            router_input=None if config.router.reads is None else config.router.reads(config),
        )
        # Its key is there from the start: a new one would make `torch.compile` begin again.
        self.last_selection[adapter_name] = None
        self.mixlora_factors_a[adapter_name] = FactorPool(config.factors, self.in_features).init_like_lora()
        factors_b = FactorPool(config.factors, self.out_features)
        if not config.init_weights:
            # As LoRA's B, a linear layer of r inputs, starts without a rule of its own.
            nn.init.uniform_(factors_b.weight, -(config.r**-0.5), config.r**-0.5)
        self.mixlora_factors_b[adapter_name] = factors_b
        self.mixlora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        if config.router.reads is not None and holder == self.name:
            if config.normalize:
                self.mixlora_standardiser[adapter_name] = Standardiser(width)
            bias = config.router_init != "random"
            self.mixlora_router_a[adapter_name] = nn.Linear(width, config.factors, bias=bias)
            if config.pairing == "separate":
                self.mixlora_router_b[adapter_name] = nn.Linear(width, config.factors, bias=bias)
            if config.pairing == "separate" and config.cfs != "none":
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
        """Map (B, ..., d_in) to (B, ..., d_out); the first dimension counts instances, the others their tokens.

        Within a model's forward pass the input may also hold the tokens of all rows in one list, (B * S, d_in), and
        rows may hold several instances (`ForwardInfo.segments`).

        Raises:
            ValueError: which instance a row of the input belongs to is not known.
        """
        info = self.context.info
        if info.bare and not torch.compiler.is_compiling():
            self._refuse_to_recompute()
        uses = self._uses(info)
        if not uses and info.adapters is None:
            return self.base_layer(hidden, *args, **kwargs)  # type: ignore[no-any-return]
        rows = info.by_instance(hidden, self.name)
        if info.adapters is not None and not (
            len(info.adapters) == len(rows) and info.segments is None and info.own_rows
        ):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(info.adapters)} and {info.count_of(rows)} respectively ({self.name})"
            )
        whole_batch = len(uses) == 1 and uses[0][1] is None and info.segments is None
        if whole_batch and not (args or kwargs) and self._is_plain(uses[0][0], rows):
            output = self._adapted(uses[0][0], hidden, rows, info)
        else:
            output = self.base_layer(rows, *args, **kwargs)
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"{self.name}: a {type(self.base_layer).__name__} gives a {type(output).__name__}, to which "
                    "nothing can be added; leave the layer out of target_modules"
                )
            for name, index in uses:
                output = self._updated(output, name, index, hidden, rows, info)
        return output if rows is hidden else output.flatten(0, 1)

    def _refuse_to_recompute(self) -> None:
        if self.context.root is not None and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                f"{self.name}: an activation checkpoint that is not transformers' own computes this layer again, "
                "outside of its forward pass, where padding and instances are not known; use "
                "model.gradient_checkpointing_enable() (TrainingArguments: gradient_checkpointing=True) instead"
            )

    def _uses(self, info: ForwardInfo) -> list[tuple[str, Tensor | None]]:
        """The adapters at work, each with the rows that it is for; None = all of them."""
        if self.disable_adapters:
            return []
        if info.adapters is None:
            return [(name, None) for name in self.active_adapters if name in self.rules]
        names = info.adapters
        return [
            (name, torch.tensor([row for row, of_row in enumerate(names) if of_row == name]))
            for name in self.rules
            if name in names
        ]

    def _is_plain(self, name: str, rows: Tensor) -> bool:
        if not is_plain(self.base_layer, rows):
            return False
        # Only where there are gradients are the pools used without being called.
        if not (self.training or torch.is_grad_enabled()):
            return True
        pools = self.mixlora_factors_a[name], self.mixlora_factors_b[name]
        return all(is_unwatched(pool, FactorPool) for pool in pools)

    def _adapted(self, name: str, hidden: Tensor, rows: Tensor, info: ForwardInfo) -> Tensor:
        """Base layer and update in one step."""
        chosen, rule = self._chosen(name, hidden, rows, info), self.rules[name]
        dropout = rule.dropout if self.training else 0.0
        if not torch.is_grad_enabled() and not dropout:
            factors = self._rows(name, chosen, rows.dtype)
            return adapted_linear_of_rows(self.base_layer, rows, *factors, rule.scaling)
        pool_a, pool_b = self.mixlora_factors_a[name], self.mixlora_factors_b[name]
        assert isinstance(pool_a, FactorPool) and isinstance(pool_b, FactorPool)
        return adapted_linear(
            self.base_layer, rows, pool_a.weight, pool_b.weight, chosen.selection, rule.scaling, dropout
        )

    def _updated(
        self, output: Tensor, name: str, index: Tensor | None, hidden: Tensor, rows: Tensor, info: ForwardInfo
    ) -> Tensor:
        """The base layer's output (B, ..., d_out) with one adapter's update, of the rows `index` alone if given."""
        chosen, scaling = self._chosen(name, hidden, rows, info), self.rules[name].scaling
        dropped, weight = self.mixlora_dropout[name](rows), chosen.selection.weight
        if info.segments is not None:
            every = torch.arange(self.rules[name].num_factors, device=rows.device)
            pools = self.mixlora_factors_a[name](every), self.mixlora_factors_b[name](every)
            return add_low_rank_by_token(
                output, dropped, *pools, chosen.selection, info.segments.ids, scaling
            )
        factors = self._rows(name, chosen, rows.dtype)
        if index is None:
            return add_low_rank(output, dropped, *factors, scaling, weight)
        index = index.to(output.device)
        rows_a, rows_b = (of_instance[index] for of_instance in factors)
        weight = None if weight is None else weight[index]
        updated = add_low_rank(output[index], dropped[index], rows_a, rows_b, scaling, weight)
        return output.index_copy(0, index, updated)

    def _chosen(self, name: str, hidden: Tensor, rows: Tensor, info: ForwardInfo) -> CachedSelection:
        """The factors of these instances: those of their prompt if they go on with one, else newly selected."""
        rule = self.rules[name]
        call = info.calls.get((id(self), name), 0)
        info.calls[id(self), name] = call + 1
        key = (id(self), name, call)
        if rule.keeps and info.continues:
            kept = info.answer.kept.get(key)
            if kept is not None:
                self._check_rows(kept.selection.index_a.shape[0], rows, info)
                return kept
        if (info.orphan or info.continues) and rule.keeps and rule.source == "tokens":
            raise ValueError(
                f"{self.name}: this pass goes on with a cache that no pass of this model with the adapter {name} has "
                "filled, so the factors of its prompt are not known; let them fill it, and hand that very object on"
            )
        selection = self._select(name, rule, hidden, rows, info)
        info.answer.kept[key] = kept = CachedSelection(selection.without_gradient())
        self.last_selection[name] = kept.selection
        return kept if selection.weight is None else CachedSelection(selection)

    def _check_rows(self, kept: int, rows: Tensor, info: ForwardInfo) -> None:
        if kept != info.count_of(rows):
            raise ValueError(
                f"{self.name}: this pass has {info.count_of(rows)} rows, but the cache that it goes on with was "
                f"filled by {kept}, whose factors are kept for their answers: go on with the same rows, or read the "
                "prompts anew"
            )

    def _rows(self, name: str, chosen: CachedSelection, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The selected factors (B, r, d_in) and (B, r, d_out); looked up once for an answer, which has many passes.

        What is looked up once is kept in the type of the input, which a quantised layer's weight does not have.
        """
        if chosen.rows is not None and not torch.is_grad_enabled():
            return chosen.rows
        rows_a: Tensor = self.mixlora_factors_a[name](chosen.selection.index_a)
        rows_b: Tensor = self.mixlora_factors_b[name](chosen.selection.index_b)
        if self.rules[name].keeps and self.context.generating and not torch.is_grad_enabled():
            chosen.rows = rows_a.to(dtype), rows_b.to(dtype)
        return rows_a, rows_b

    def _select(self, name: str, rule: _Rule, hidden: Tensor, rows: Tensor, info: ForwardInfo) -> Selection:
        if not info.own_rows and (rule.source == "task" or info.seeds is not None):
            raise ValueError(
                f"{self.name}: this layer's rows are not those of the batch, so neither task_embeddings nor "
                "routing_seeds can be given to them; leave the layer out of target_modules"
            )
        if rule.router_input is None:
            return self._select_by_chance(rule, rows, info)
        if rule.source == "tokens":
            info.check_choice(rows, self.name)
        if rule.holder != self.name:
            return self._of_block(name, rule, info)
        learning = rule.learns and torch.is_grad_enabled()
        # Near-ties must fall the same way whatever type the layer computes in.
        with torch.set_grad_enabled(learning), _without_autocast(rows.device.type):
            read = rule.router_input(self.context, hidden, rows, self.training)
            selection = self._select_by_routers(name, rule, read, learning)
        if rule.block:
            info.blocks[rule.block, name, info.calls[id(self), name] - 1] = selection
        return selection

    def _of_block(self, name: str, rule: _Rule, info: ForwardInfo) -> Selection:
        found = info.blocks.get((rule.block, name, info.calls[id(self), name] - 1))
        if found is None:
            raise ValueError(
                f"{self.name}: per=block gives this layer the factors that {rule.holder} selects, which this pass has "
                "not called before it; use per=layer"
            )
        device = self.mixlora_factors_a[name].weight.device
        weight = None if found.weight is None else found.weight.to(device)  # type: ignore[arg-type]
        return Selection(found.index_a.to(device), found.index_b.to(device), weight)  # type: ignore[arg-type]

    @torch.no_grad()
    def select_by_task(self, name: str, embeddings: Tensor) -> Selection:
        """What routing=task selects for instances of N tasks, by their definitions' embeddings (N, d); no pass."""
        assert self.rules[name].source == "task"
        read = embeddings.to(self.mixlora_factors_a[name].weight.device).float()  # type: ignore[arg-type]
        with _without_autocast(read.device.type):
            return self._select_by_routers(name, self.rules[name], read, learning=False)

    def _select_by_chance(self, rule: _Rule, rows: Tensor, info: ForwardInfo) -> Selection:
        count = info.count_of(rows)
        if info.seeds is not None:
            return self._select_by_seeds(rule, rows, info, count)
        # Beams of one input swap their histories, so they must share their factors.
        index_a, index_b = (
            random_factors(count // info.copies, rule.num_factors, rule.rank, rows.device) for _ in range(2)
        )
        return Selection(
            index_a.repeat_interleave(info.copies, dim=0), index_b.repeat_interleave(info.copies, dim=0)
        )

    def _select_by_seeds(self, rule: _Rule, rows: Tensor, info: ForwardInfo, count: int) -> Selection:
        assert info.seeds is not None
        if len(info.seeds) != count:
            raise ValueError(
                f"routing_seeds={tuple(info.seeds.shape)}: expected one for each instance, ({count},)"
            )
        # A and B of each pass have their own draws; under decode=prefill only the first pass draws.
        first, seeds = self.stream + 2 * info.step, info.seeds.to(rows.device)
        index_a, index_b = (
            seeded_factors(seeds, first + side, rule.num_factors, rule.rank) for side in range(2)
        )
        return Selection(index_a, index_b)

    def _select_by_routers(self, name: str, rule: _Rule, read: Tensor, learning: bool) -> Selection:
        """Eq. 6 for A, Eq. 8 (Eq. 6 without CFS) for B, from what the routers read (N, width).

        The largest of softmax(x) are the largest of x, where no two of them are lost to the same rounded probability.
        """
        if name in self.mixlora_standardiser:
            read = self._standardised(name, rule, read)
        logits_a = _logits(self.mixlora_router_a[name], read)
        index_a = top_factors(logits_a, rule.rank)
        # Scores: logits, or what Eq. 8 makes of their probabilities.
        scores_b, index_b, is_fused = logits_a, index_a, False
        if not rule.tied:
            scores_b = _logits(self.mixlora_router_b[name], read)
            is_fused = name in self.mixlora_router_ab
            if is_fused:
                logits_ab = self.mixlora_router_ab[name](self.mixlora_factors_a[name](index_a))
                scores_b = fused_probabilities(
                    independent_probabilities(scores_b), conditional_scores(logits_ab)
                )
            index_b = top_factors(scores_b, rule.rank)
        if learning and self.context.collect_balance:
            p_a, p_b = _probabilities(logits_a, False), _probabilities(scores_b, is_fused)
            # p_B of Eq. 8 is a sum of two distributions.
            share_b = p_b / p_b.detach().sum(dim=-1, keepdim=True)
            self.context.balance_terms += [load_balance(p_a, index_a), load_balance(share_b, index_b)]
        if not learning:
            return Selection(index_a, index_b)
        weight = straight_through_weight(_probabilities(logits_a, False), index_a)
        if not rule.tied:
            weight = weight * straight_through_weight(_probabilities(scores_b, is_fused), index_b)
        return Selection(index_a, index_b, weight)

    def _standardised(self, name: str, rule: _Rule, read: Tensor) -> Tensor:
        """What the routers read, by the adapter's statistics; while these are taken, `read` is kept for them."""
        standardiser = self.mixlora_standardiser[name]
        assert isinstance(standardiser, Standardiser)
        if self.context.collecting is not None:
            self.context.collecting.setdefault((self.name, name), []).append(read.detach().cpu())
            return read
        if not standardiser.known:
            raise ValueError(
                f"{self.name}: normalize=True needs the statistics of some training inputs; before the first step, "
                "read them inside of `with model.base_model.calibrated():`"
            )
        standardised: Tensor = standardiser(read)
        return standardised

    @torch.no_grad()
    def calibrate(self, name: str, read: Tensor, tasks: Tensor | None = None) -> None:
        """Take the statistics that routing.normalize needs, and the routers' first values where these follow from them.

        Args:
            name: the adapter.
            read: descriptions (N, width) of N training instances, as the routers see them.
            tasks: (N,) whose they are, 0 to T - 1; for router_init=tasks.
        """
        standardiser, rule = self.mixlora_standardiser[name], self.rules[name]
        assert isinstance(standardiser, Standardiser)
        standardiser.take(read.to(standardiser.mean.device))
        if rule.router_init == "random":
            return
        # On the CPU, so that the same draws are made whatever the device; by the program's seed and the layer.
        standardised = standardiser(read.to(standardiser.mean.device)).cpu()
        seed = (self.stream ^ torch.initial_seed()) % 2**32
        generator = torch.Generator().manual_seed(seed)
        if rule.router_init == "clusters":
            tasks = clusters(standardised, 2 * rule.num_factors, seed)
        assert tasks is not None
        for routers in (self.mixlora_router_a, self.mixlora_router_b):
            if name in routers:
                router: Any = routers[name]
                sizes = router.out_features, rule.rank
                weight, bias = of_tasks(standardised, tasks, *sizes, generator)
                router.weight.copy_(weight)
                router.bias.copy_(bias)

    def __repr__(self) -> str:
        return "mixlora." + super().__repr__()


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Entered for every layer of every pass, so no context where there is nothing to switch off."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _probabilities(scores: Tensor, are_fused: bool) -> Tensor:
    """(B, E) of a router's logits, or of Eq. 8's sums, which are probabilities already."""
    return scores if are_fused else independent_probabilities(scores)


def _block_of(name: str) -> str:
    """The numbered block that a layer is in: `model.layers.3` of `model.layers.3.mlp.up_proj`; else the layer."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else name


def _logits(router: nn.Module, read: Tensor) -> Tensor:
    """fp32 logits (N, E) of a router whose weights may be in another type (DeepSpeed's bf16 casts them)."""
    weight: Tensor = router.weight  # type: ignore[assignment]
    logits: Tensor = router(read.to(weight.dtype))
    return logits.float()
