"""One linear layer in every form that is compared, around the same frozen weight and fed with the same input.

The input needs a gradient, as it does within a network, and the weights have the types that training gives them: the
frozen weight in the number format of the case, what is trained in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from mixlora_cli.analysis.bench.counters import Variant
from mixlora_cli.method.config import MixLoraConfig
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
from mixlora_cli.models.forward import matrix_products_in

LINEAR, LORA, PUBLISHED = "linear", "lora", "published"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPREAD = 0.02
"""Standard deviation of the trained weights: an untrained adapter multiplies by zeros."""


def mixlora(num_factors: int) -> str:
    """Name of the variant with a pool of E factors."""
    return f"mixlora_e{num_factors}"


@dataclass(frozen=True)
class LayerCase:
    """What the variants of one layer have in common."""

    d_in: int
    d_out: int
    dtype: str
    """"fp32" or "bf16"."""
    batch: int
    tokens: int
    """Of each instance."""
    rank: int
    seed: int = 0


class OneLayer(nn.Module):
    """A model of one linear layer, called like a transformers model, so that routing learns of the padding."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S, d_in), (B, S) -> (B, S, d_out)."""
        output: Tensor = self.proj(inputs_embeds)
        return output


@dataclass(frozen=True)
class Bench:
    """The variants of one case and what they compute on."""

    models: Mapping[str, nn.Module]
    hidden: Tensor
    """(B, S, d_in), a leaf that requires a gradient."""
    mask: Tensor
    """(B, S) int64, all ones: no padding."""
    gradient: Tensor
    """(B, S, d_out), what comes back from the layers above."""
    dtype: torch.dtype

    def forward(self, name: str) -> Tensor:
        """Output of one variant, in the number format that training would use."""
        with matrix_products_in(self.models[name], self.dtype, self.hidden.device.type):
            output: Tensor = self.models[name](inputs_embeds=self.hidden, attention_mask=self.mask)
        return output

    def forward_backward(self, name: str) -> None:
        self.forward(name).backward(self.gradient)  # type: ignore[no-untyped-call]

    def clear(self, name: str) -> None:
        """Forget the gradients, as an optimizer does after its step."""
        self.hidden.grad = None
        self.models[name].zero_grad(set_to_none=True)

    def variants(self) -> dict[str, Variant]:
        """What is timed: forward and backward."""
        return {
            name: Variant(partial(self.forward_backward, name), partial(self.clear, name))
            for name in self.models
        }


def build_bench(
    case: LayerCase, factors: int, pools: list[int], device: torch.device, with_published: bool = True
) -> Bench:
    """Frozen linear, LoRA, MixLoRA with each pool, and the published form with a pool of `factors`.

    Random numbers come from the case's seed; torch's global generator is left as it was.
    """
    dtype = DTYPES[case.dtype]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(case.seed)
        linear = nn.Linear(case.d_in, case.d_out, bias=False, device=device, dtype=dtype)
        linear.requires_grad_(False)
        lora = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, lora_dropout=0.0, target_modules=["proj"])
        configs: dict[str, PeftConfig] = {LORA: lora}
        for pool in pools:
            configs[mixlora(pool)] = MixLoraConfig(
                r=case.rank, factors=pool, dropout=0.0, target_modules=["proj"]
            )
        models = {LINEAR: _as_trained(OneLayer(linear))}
        for name, config in configs.items():
            models[name] = _as_trained(get_peft_model(OneLayer(linear), config))
        if with_published:
            scaling = MixLoraConfig(r=case.rank, factors=factors).scaling
            published = PublishedForm(linear, case.rank, factors, scaling).to(device)
            models[PUBLISHED] = _as_trained(published)
        shape = (case.batch, case.tokens)
        hidden = torch.randn(*shape, case.d_in, device=device, dtype=dtype).requires_grad_()
        gradient = torch.randn(*shape, case.d_out, device=device, dtype=dtype)
    return Bench(models, hidden, torch.ones(shape, dtype=torch.long, device=device), gradient, dtype)


def _as_trained(model: nn.Module) -> nn.Module:
    """In training mode, trained weights in fp32 and not zero."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter.data, dtype=torch.float32) * SPREAD
    return model.train()


class PublishedForm(nn.Module):
    """The published code's form: W h + (alpha / r) * h (A B), the (d_in, d_out) matrix A B of each instance formed.

    `routing=instance` with frozen routers. It is written from a description of that code; the factors are selected with
    the same equations as ours, batched.
    """

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
        index_a, index_b = self._indices(inputs_embeds, attention_mask)
        rows_a, rows_b = self.factors_a(index_a), self.factors_b(index_b)  # (B, r, d_in), (B, r, d_out)
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


class PublishedLayer(PublishedForm):
    """The same where a linear layer was, which knows of no padding: as it is for a single instance."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """(B, S, d_in) -> (B, S, d_out); padding counts in what selects, at the same cost."""
        return super().forward(hidden, torch.ones(hidden.shape[:2], device=hidden.device))


def into_published_form(model: nn.Module) -> None:
    """Put an untrained layer in the published form in the place of every MixLoRA layer; the linear layers stay."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MixLoraLayer)}
    for name, layer in layers.items():
        (rule,) = layer.rules.values()
        linear = layer.base_layer
        published = PublishedLayer(linear, rule.rank, rule.num_factors, rule.scaling)
        model.set_submodule(name, published.to(linear.weight.device).eval())
