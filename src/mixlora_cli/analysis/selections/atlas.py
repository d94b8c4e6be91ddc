"""Everything that is drawn and measured: the maps of the chosen layers, of A and of B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from mixlora_cli.analysis.selections.factor_use import (
    Matching,
    factor_use,
    match_pairs,
    mean_similarity,
    overlap,
)
from mixlora_cli.analysis.selections.inputs import Instances
from mixlora_cli.analysis.selections.layout import fitting_perplexity, places, spread
from mixlora_cli.analysis.selections.palette import Style, styles_of
from mixlora_cli.analysis.selections.separation import Separation, separation
from mixlora_cli.analysis.selections.source import Layer, Source
from mixlora_cli.analysis.selections.space import Floats, Ints, Space, contingency, make_space
from mixlora_cli.analysis.selections.store import TaskSelections
from mixlora_cli.config import TsneConfig
from mixlora_cli.data.records import Record
from mixlora_cli.progress import with_bar


@dataclass(frozen=True)
class Panel:
    """The map of one layer's A or B."""

    layer: Layer
    side: str
    index: Ints
    """(n, r) selected factors of each instance, best first."""
    space: Space
    points: Floats
    """(n, 2) in the unit square."""
    separation: Separation
    use: Floats
    """(T, E), see `factor_use`."""
    overlap: Floats
    """(T, T), see `overlap`."""
    similarity: Floats
    """(T, T), see `mean_similarity`."""
    matching: Matching | None
    """With `pairs` alone."""

    @property
    def title(self) -> str:
        """For people: `A, layer 15`."""
        return f"{self.side.upper()}, layer {self.layer.block}"


@dataclass(frozen=True)
class Atlas:
    """All maps of one call, over the same instances."""

    tasks: Sequence[Instances]
    labels: Ints
    """(n,) number of each instance's task."""
    records: Sequence[Record]
    """Of each instance."""
    styles: Mapping[str, Style]
    panels: Sequence[Panel]
    perplexity: float
    neighbours: int
    notes: Sequence[str]
    """What differs from what was asked for, and what a reader has to know."""


def make_atlas(
    config: TsneConfig,
    source: Source,
    chosen: Sequence[Instances],
    selections: Sequence[TaskSelections],
    console: Console,
) -> Atlas:
    """Embed and measure the selections of the drawn layers; the same arguments give the same atlas.

    Args:
        selections: of `chosen`, one each.
    """
    records = [
        record
        for instances, found in zip(chosen, selections, strict=True)
        for record in _of(instances.records, found.indices)
    ]
    sizes = [len(found.indices) for found in selections]
    labels = np.repeat(np.arange(len(chosen)), sizes)
    perplexity = fitting_perplexity(config.tsne.perplexity, len(records))
    neighbours = min(config.tsne.neighbours, min(sizes) - 1)
    names = [instances.task for instances in chosen]
    pairs = [(names.index(seen), names.index(unseen)) for seen, unseen in config.pairs or []]
    wanted = [(layer, side) for side in dict.fromkeys(config.tsne.sides) for layer in source.drawn]
    bar = with_bar(wanted, "drawing the maps", console)
    panels = [
        _panel(config, source, layer, side, selections, labels, neighbours, perplexity, pairs)
        for layer, side in bar
    ]
    return Atlas(
        tasks=chosen,
        labels=labels,
        records=records,
        styles=styles_of(names, config.pairs),
        panels=panels,
        perplexity=perplexity,
        neighbours=neighbours,
        notes=_notes(config, source, chosen, sizes, perplexity, neighbours),
    )


def _panel(
    config: TsneConfig,
    source: Source,
    layer: Layer,
    side: str,
    selections: Sequence[TaskSelections],
    labels: Ints,
    neighbours: int,
    perplexity: float,
    pairs: Sequence[tuple[int, int]],
) -> Panel:
    """Embed and measure one layer's A or B."""
    index = np.concatenate([found.read[layer.name, side] for found in selections])
    space = make_space(index, source.adapter.factors)
    num_tasks, shuffles = len(selections), config.tsne.permutations
    table = contingency(space.group, labels, num_tasks)
    use = factor_use(space, table)
    shared = overlap(use, space.rank)
    centres = places(space, perplexity, config.seed)
    return Panel(
        layer=layer,
        side=side,
        index=index,
        space=space,
        points=spread(centres, space.group, labels),
        separation=separation(space, labels, num_tasks, neighbours, shuffles, config.seed),
        use=use,
        overlap=shared,
        similarity=mean_similarity(space, table),
        matching=match_pairs(shared, pairs, config.seed),
    )


def _of(records: Sequence[Record], indices: Sequence[int]) -> list[Record]:
    by_index = {record.index: record for record in records}
    return [by_index[index] for index in indices]


def _notes(
    config: TsneConfig,
    source: Source,
    chosen: Sequence[Instances],
    sizes: Sequence[int],
    perplexity: float,
    neighbours: int,
) -> list[str]:
    settings, notes = config.tsne, []
    fewer = [
        f"{one.task} {size}"
        for one, size in zip(chosen, sizes, strict=True)
        if size < min(settings.instances, one.available)
    ]
    small = [f"{one.task} {one.available}" for one in chosen if one.available < settings.instances]
    if small:
        notes.append(f"fewer than {settings.instances} instances, so all there are: {', '.join(small)}")
    if fewer:
        notes.append(
            f"fewer than wanted: {', '.join(fewer)}; questions about one picture are taken together or not at all, and "
            "what cannot be read is left out"
        )
    if perplexity < settings.perplexity:
        notes.append(
            f"perplexity {perplexity:.3g} in the place of {settings.perplexity:.3g}: too few points for it"
        )
    if neighbours < settings.neighbours:
        notes.append(
            f"{neighbours} neighbours in the place of {settings.neighbours}: the smallest task has no more"
        )
    if source.adapter.routing == "random":
        notes.append(
            f"routing=random: chance selects, here with seed {settings.routing_seed}; no input changes it"
        )
    elif source.adapter.routing == "task":
        notes.append("routing=task: all instances of a task have one selection, so they share one place")
    elif source.adapter.decode == "step":
        notes.append(
            "decode=step: this adapter selects anew for each decoded token; drawn is the prompt's selection"
        )
    return notes
