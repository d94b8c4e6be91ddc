"""Bytes that a training writes, and the base that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixlora_cli.analysis.planning.counts import Count, num_frozen, num_trained
from mixlora_cli.analysis.planning.network import Network

_HALF, _FLOAT, _MOMENTS = 2, 4, 8


@dataclass(frozen=True)
class Disk:
    """In bytes."""

    base: float
    """The base model's checkpoint in 16 bits."""
    adapter: float
    """What training leaves behind, in fp32: MixLoRA's frozen routers belong to it."""
    checkpoints: float
    """All that are kept at once, and one that is being written: adapter and optimizer moments each."""
    features: float
    """Of all pictures, where `train.cache_features` keeps them; an instance is taken to have a picture of its own."""

    @property
    def total(self) -> float:
        """Everything but the data."""
        return self.base + self.adapter + self.checkpoints + self.features


def disk(
    counts: Sequence[Count], network: Network, instances: int, cached: bool, kept_checkpoints: int
) -> Disk:
    """Sizes without the data, and without the few kilobytes of configuration and metrics."""
    added = sum(count.trained + count.frozen for count in counts if count.kind in ("factors", "routers"))
    whole = num_trained(counts) + num_frozen(counts)
    trained_base = sum(count.trained for count in counts if count.kind not in ("factors", "routers"))
    adapter = _FLOAT * (added + trained_base)
    return Disk(
        base=_HALF * (whole - added),
        adapter=adapter,
        checkpoints=(kept_checkpoints + 1) * (adapter + _MOMENTS * num_trained(counts)),
        features=_HALF * instances * network.tower_tokens * network.tower_width if cached else 0.0,
    )
