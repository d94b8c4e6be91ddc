"""The published code seen from outside: what it saves for the tiny model, and what its layers compute, in plain loops.

Written from what the code does to its own tensors, in its own shapes; nothing of the importer is used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

NUM_LAYERS, HIDDEN, VISION = 2, 32, 16
LINEARS = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 64),
    "mlp.up_proj": (32, 64),
    "mlp.down_proj": (64, 32),
}
"""(d_in, d_out) in the tiny model."""
FACTORS, RANK, ALPHA = 8, 3, 16
PREFIX = "base_model.model.model.layers"

Tensors = dict[str, Tensor]


def state_dict(
    cond_type: str = "input_lora_a_param", projector: str = "mlp", dtype: torch.dtype = torch.float32
) -> Tensors:
    """All tensors of `pytorch_model.bin`: the adapter's, the projector's and some of the frozen base's."""
    generator = torch.Generator().manual_seed(5)

    # Not so large that probabilities saturate: the order of factors that tie at zero is anybody's.
    def normal(*shape: int, scale: float = 0.3) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    tensors = {
        "base_model.model.model.embed_tokens.weight": normal(20, HIDDEN),
        "base_model.model.model.cmoa_attribute_encoder.0.weight": normal(HIDDEN, 6),
        "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (
            normal(VISION, VISION)
        ),
        "base_model.model.lm_head.weight": normal(20, HIDDEN),
    }
    for layer in range(NUM_LAYERS):
        for linear, (d_in, d_out) in LINEARS.items():
            name = f"{PREFIX}.{layer}.{linear}"
            tensors[f"{name}.weight"] = normal(d_out, d_in)
            for number in range(FACTORS):
                tensors[f"{name}.lora_A.default.{number}"] = normal(1, d_in)
                tensors[f"{name}.lora_B.default.{number}"] = normal(1, d_out, scale=0.1)
            width = HIDDEN if cond_type == "task_embed" else d_in
            if cond_type == "random":
                continue
            tensors[f"{name}.cmoa_selector.loraA_selector.weight"] = normal(FACTORS, width)
            if cond_type != "input_lora_a_param":
                tensors[f"{name}.cmoa_selector.loraB_selector.weight"] = normal(FACTORS, width)
                continue
            extra = f"{name}.cmoa_loarB_extra_selector"
            tensors[f"{extra}.loraB_selector.weight"] = normal(FACTORS, width)
            tensors[f"{extra}.loraA_param2loraB_selector.weight"] = normal(FACTORS, RANK * d_in, scale=0.05)
    parts = {"mlp": {"0.": VISION, "2.": HIDDEN}, "linear": {"": VISION}, "none": {}}[projector]
    for position, features in parts.items():
        tensors[f"base_model.model.model.mm_projector.{position}weight"] = normal(HIDDEN, features)
        tensors[f"base_model.model.model.mm_projector.{position}bias"] = normal(HIDDEN)
    return tensors


def arguments(cond_type: str = "input_lora_a_param", **changes: Any) -> SimpleNamespace:
    """What `cmoa_args.bin` holds."""
    fields = {
        "cond_type": cond_type,
        "n_experts": FACTORS,
        "n_selected": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "lora_bias": "none",
        "mix_mm_projector": False,
        "attribute_dim": 32,
        "used_scored_weight": False,
        "independent_rank": True,
        "mix_loraA": True,
        "mix_start_layer": 0,
        "ifs_weight": 1.0,
    }
    return SimpleNamespace(**(fields | changes))


def write(
    folder: Path,
    tensors: Tensors | None = None,
    namespace: SimpleNamespace | None = None,
) -> Path:
    """A checkpoint's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state_dict() if tensors is None else tensors, folder / "pytorch_model.bin")
    torch.save(arguments() if namespace is None else namespace, folder / "cmoa_args.bin")
    return folder


def _softmax(values: list[Tensor]) -> list[Tensor]:
    exponentials = [torch.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def _best(values: list[Tensor]) -> list[int]:
    return sorted(range(len(values)), key=lambda number: -values[number].item())[:RANK]


def select(tensors: Tensors, name: str, description: Tensor, form: str) -> tuple[list[int], list[int]]:
    """Numbers of the factors for one instance; `description` (width) is what the selectors read."""

    def logits(selector: str) -> list[Tensor]:
        weight = tensors[f"{name}.{selector}.weight"].float()
        return [(weight[e] * description).sum() for e in range(FACTORS)]

    index_a = _best(logits("cmoa_selector.loraA_selector"))
    if form == "none":
        return index_a, _best(logits("cmoa_selector.loraB_selector"))
    weight = tensors[f"{name}.cmoa_loarB_extra_selector.loraA_param2loraB_selector.weight"].float()
    scores = [torch.tensor(0.0) for _ in range(FACTORS)]
    for i, number in enumerate(index_a):
        factor = tensors[f"{name}.lora_A.default.{number}"][0].float()
        d_in = len(factor)
        own = [weight[e, i * d_in : (i + 1) * d_in] for e in range(FACTORS)]
        if form == "released":  # features of A and of the weight are summed apart
            row = [factor.sum() * own[e].sum() for e in range(FACTORS)]
        else:
            row = [(factor * own[e]).sum() for e in range(FACTORS)]
        scores = [score + p for score, p in zip(scores, _softmax(row), strict=True)]
    independent = _softmax(logits("cmoa_loarB_extra_selector.loraB_selector"))
    return index_a, _best([p + q for p, q in zip(independent, _softmax(scores), strict=True)])


def update(tensors: Tensors, name: str, hidden: Tensor, form: str, task: Tensor | None = None) -> Tensor:
    """alpha / r * h A B of every instance (B, S, d_out); the mean is over all positions, as published."""
    rows = []
    for n, instance in enumerate(hidden):
        description = instance.mean(dim=0) if task is None else task[n]
        index_a, index_b = select(tensors, name, description.float(), form)
        total = torch.tensor(0.0)
        for a, b in zip(index_a, index_b, strict=True):
            inner = instance @ tensors[f"{name}.lora_A.default.{a}"][0].float()
            total = total + inner[:, None] * tensors[f"{name}.lora_B.default.{b}"][0].float()
        rows.append(ALPHA / RANK * total)
    return torch.stack(rows)


def as_published(base: Any, tensors: Tensors, form: str, task: Tensor | None = None) -> nn.Module:
    """The base with the checkpoint's projector, and the published computation hooked to its linear layers."""
    projector = base.model.multi_modal_projector
    with torch.no_grad():
        for name, tensor in tensors.items():
            place, _, kind = name.partition("mm_projector.")[2].rpartition(".")
            if kind:
                layer = projector.linear_2 if place == "2" else projector.linear_1
                getattr(layer, kind).copy_(tensor)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda module, inputs, output: output + update(tensors, name, inputs[0], form, task)

    for layer in range(NUM_LAYERS):
        for linear in LINEARS:
            module = base.model.language_model.layers[layer].get_submodule(linear)
            module.register_forward_hook(hook(f"{PREFIX}.{layer}.{linear}"))
    adapted: nn.Module = base
    return adapted
