"""The form of the published code, for comparison: a (d_in, d_out) update matrix for each instance.

Each instance's low-rank product is multiplied out, all its tokens go through that matrix beside the frozen one, and the
result is scaled and added in passes of their own. Only the *form* is that of the published code; it is written from its
description, and the factors are selected with the same equations as ours, batched.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixlora_cli.method.factors import ConditionalRouter, FactorPool
from mixlora_cli.method.layer import MixLoraLayer
from mixlora_cli.method.pooling import masked_mean
from mixlora_cli.method.selection import (
    conditional_logits,
    conditional_scores,
    fused_probabilities,
    independent_probabilities,
    top_factors,
)


class PublishedForm(nn.Module):
    """W h + (alpha / r) * h (A B) with (A B) of each instance multiplied out; `routing=instance`, frozen routers."""

    def __init__(self, linear: nn.Linear, rank: int, num_factors: int, scaling: float) -> None:
        super().__init__()
        d_in, d_out = linear.in_features, linear.out_features
        self.linear = linear
        self.rank, self.scaling = rank, scaling
        self.factors_a = FactorPool(num_factors, d_in).init_like_lora()
        self.factors_b = FactorPool(num_factors, d_out)
        self.router_a = nn.Linear(d_in, num_factors, bias=False).requires_grad_(False)
        self.router_b = nn.Linear(d_in, num_factors, bias=False).requires_grad_(False)
        self.router_ab = ConditionalRouter(rank, d_in, num_factors, conditional_logits).requires_grad_(False)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S, d_in), (B, S) -> (B, S, d_out)."""
        output: Tensor = self.linear(inputs_embeds)
        rows_a, rows_b = self._select(inputs_embeds, attention_mask)
        matrices = torch.bmm(rows_a.transpose(1, 2), rows_b)  # (B, d_in, d_out)
        return output + torch.bmm(inputs_embeds, matrices) * self.scaling

    @torch.no_grad()
    def _indices(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 5 to 8: (B, r) of A, (B, r) of B."""
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = masked_mean(hidden, mask.bool())
            index_a = top_factors(independent_probabilities(self.router_a(pooled)), self.rank)
            scores = conditional_scores(self.router_ab(self.factors_a(index_a)))
            independent = independent_probabilities(self.router_b(pooled))
            return index_a, top_factors(fused_probabilities(independent, scores), self.rank)

    def _select(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the pools (B, r, d_in) and (B, r, d_out)."""
        index_a, index_b = self._indices(hidden, mask)
        return self.factors_a(index_a), self.factors_b(index_b)


class PublishedLayer(PublishedForm):
    """The same for a single instance, which has no padding: it goes where a linear layer was."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """(1, S, d_in) -> (1, S, d_out)."""
        return super().forward(hidden, torch.ones(hidden.shape[:2], device=hidden.device))


def into_published_form(model: nn.Module) -> None:
    """Put an untrained layer in the published form in the place of every MixLoRA layer; the linear layers stay."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MixLoraLayer)}
    for name, layer in layers.items():
        (rule,) = layer.rules.values()
        linear = layer.base_layer
        published = PublishedLayer(linear, rule.rank, rule.num_factors, rule.scaling)
        model.set_submodule(name, published.to(linear.weight.device).eval())
