"""The adapter whose selections are read, and the layers of it that are drawn: refused before a model loads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from mixlora_cli.config import TsneConfig
from mixlora_cli.errors import UserError, did_you_mean
from mixlora_cli.evaluation.subject import MixLoraSubject, mixlora_at
from mixlora_cli.models.adapters import ADAPTER_WEIGHTS

_POOL = re.compile(r"(?:base_model\.model\.)?(.+)\.mixlora_factors_a\b.*")
_BLOCK = re.compile(r".*\blayers\.(\d+)\..*?(\w+)$")


@dataclass(frozen=True)
class Layer:
    """One adapted linear layer of the language model."""

    block: int
    """Number of its block, from 0."""
    name: str
    """In the base model."""


@dataclass(frozen=True)
class Source(MixLoraSubject):
    """A finished MixLoRA adapter, and its layers of the wanted kind."""

    layers: Sequence[Layer]
    """All blocks' layers named `tsne.linear`, by block: these are read."""
    drawn: Sequence[Layer]
    """Those of `tsne.layers`."""


def find_source(config: TsneConfig) -> Source:
    """Resolve `run`, and check that its adapter selects, and selects in the wanted layers.

    Raises:
        UserError: there is no finished MixLoRA adapter, chance selects without a seed, or a layer is not adapted.
    """
    assert config.run is not None  # the configuration's own check
    found = mixlora_at(
        config.run,
        config.model,
        own_weights="nothing is selected there; give a MixLoRA run",
        other_kind="selects nothing: every instance gets the same update; give a MixLoRA run",
    )
    if found.adapter.routing == "random" and config.tsne.routing_seed is None:
        raise UserError(
            f"run={config.run} routes by chance, of which a map shows nothing but the draws: give "
            "tsne.routing_seed=<number> to have one all the same"
        )
    layers = _layers(found.folder, config.tsne.linear)
    drawn = choose_layers(layers, config.tsne.layers)
    return Source(found.subject, found.folder, found.adapter, layers, drawn)


def choose_layers(layers: Sequence[Layer], wanted: Sequence[int] | None) -> list[Layer]:
    """Those of the wanted blocks, in their order; without a wish the first, the middle and the last.

    Raises:
        UserError: a block has no such layer.
    """
    if wanted is None:
        last = len(layers) - 1
        return [layers[place] for place in sorted({0, last // 2, last})]
    by_block = {layer.block: layer for layer in layers}
    for block in wanted:
        if block not in by_block:
            raise UserError(
                f"tsne.layers={block}: the adapter has no such layer; it has {layers[0].block} to {layers[-1].block}"
            )
    return [by_block[block] for block in dict.fromkeys(wanted)]


def _layers(folder: Path, linear: str) -> list[Layer]:
    """The adapted layers of this kind, by block, from the names of the adapter's weights."""
    try:
        with safe_open(str(folder / ADAPTER_WEIGHTS), framework="pt") as weights:
            names = [match[1] for key in weights.keys() if (match := _POOL.fullmatch(key))]  # noqa: SIM118
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS}: cannot be read as an adapter's weights ({error})"
        ) from None
    found = [(match, name) for name in names if (match := _BLOCK.fullmatch(name))]
    kinds = sorted({match[2] for match, _ in found})
    if linear not in kinds:
        raise UserError(
            f"tsne.linear={linear}: this adapter has {', '.join(kinds) or 'no numbered layers'}"
            f"{did_you_mean(linear, kinds)}"
        )
    return sorted(
        (Layer(int(match[1]), name) for match, name in found if match[2] == linear), key=lambda one: one.block
    )
