"""Maps of selections: where instances lie, how far selections tell tasks apart, and which factors tasks share.

Sizes: n instances, E factors in a pool, r of them selected, K distinct selections, T tasks. All numbers of a map are
functions of the table (K, T) that counts a task's instances with each selection, so that shuffling labels costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import factorial

import numpy as np
import numpy.typing as npt
from rich.console import Console
from sklearn.manifold import TSNE
from sklearn.metrics import normalized_mutual_info_score

from mixlora_cli.analysis.selections.reading import Instances, Ints, Layer, Selections
from mixlora_cli.config import TsneConfig
from mixlora_cli.data.records import Record
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.progress import with_bar

Floats = npt.NDArray[np.float64]
SILHOUETTE, KNN_PURITY, INFORMATION = "silhouette", "neighbour purity", "mutual information"
_GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))
_SHARE = 0.12
"""Area that all discs cover together, where the places of the selections extend over 1."""
_ALL_MATCHINGS = 5040
"""At most so many matchings are all tried; of more, as many are drawn."""


@dataclass(frozen=True)
class Space:
    """The selections of n instances in one layer, of A or of B. The order inside a selection does not count."""

    vectors: npt.NDArray[np.bool_]
    """(K, E), which factors are in each distinct selection."""
    group: Ints
    """(n,) number of each instance's selection."""

    @property
    def rank(self) -> int:
        """r, factors in a selection."""
        return int(self.vectors[0].sum())

    @property
    def shared(self) -> Ints:
        """(K, K) factors that two selections have in common."""
        vectors = self.vectors.astype(np.float64)  # exact, and much faster than a product of integers
        return (vectors @ vectors.T).round().astype(np.int64)

    @property
    def distance(self) -> Floats:
        """(K, K) Jaccard distance: 1 - |common| / |union|."""
        shared = self.shared
        return 1 - shared / (2 * self.rank - shared)

    def table(self, labels: Ints, num_tasks: int) -> Floats:
        """(K, T) how many of a task's instances have each selection."""
        num_groups = int(self.group.max()) + 1
        counts = np.bincount(self.group * num_tasks + labels, minlength=num_groups * num_tasks)
        return counts.reshape(num_groups, num_tasks).astype(np.float64)


def make_space(index: Ints, num_factors: int) -> Space:
    """Of the selected factors (n, r) of each instance."""
    vectors = np.zeros((len(index), num_factors), dtype=np.bool_)
    np.put_along_axis(vectors, index, True, axis=1)
    distinct, group = np.unique(vectors, axis=0, return_inverse=True)
    return Space(distinct, group.reshape(-1).astype(np.int64))


@dataclass(frozen=True)
class Map:
    """One layer's A or B."""

    layer: Layer
    side: str
    index: Ints
    """(n, r) selected factors of each instance, best first."""
    space: Space
    points: Floats
    """(n, 2) in the unit square."""
    separation: Mapping[str, BesideChance]
    """SILHOUETTE, KNN_PURITY and INFORMATION."""
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
class Maps:
    """All maps of one call, over the same instances."""

    tasks: Sequence[Instances]
    labels: Ints
    """(n,) number of each instance's task."""
    records: Sequence[Record]
    """Of each instance."""
    each: Sequence[Map]
    perplexity: float
    neighbours: int
    notes: Sequence[str]
    """What differs from what was asked for, and what a reader has to know."""

    @property
    def names(self) -> list[str]:
        return [one.task for one in self.tasks]

    @property
    def sizes(self) -> list[int]:
        return [int(size) for size in np.bincount(self.labels, minlength=len(self.tasks))]


def make_maps(
    config: TsneConfig,
    adapter: MixLoraConfig,
    drawn: Sequence[Layer],
    chosen: Sequence[Instances],
    selections: Sequence[Selections],
    console: Console,
) -> Maps:
    """Embed and measure the selections of the drawn layers; the same arguments give the same maps.

    Args:
        selections: of `chosen`, one each.
    """
    records = []
    for instances, found in zip(chosen, selections, strict=True):
        by_index = {record.index: record for record in instances.records}
        records += [by_index[index] for index in found.indices]
    sizes = [len(found.indices) for found in selections]
    labels = np.repeat(np.arange(len(chosen)), sizes)
    perplexity = fitting_perplexity(config.tsne.perplexity, len(records))
    neighbours = min(config.tsne.neighbours, min(sizes) - 1)
    names = [instances.task for instances in chosen]
    pairs = [(names.index(seen), names.index(unseen)) for seen, unseen in config.pairs or []]

    def make_map(layer: Layer, side: str) -> Map:
        index = np.concatenate([found.factors[layer.name, side] for found in selections])
        space = make_space(index, adapter.factors)
        table = space.table(labels, len(chosen))
        use = factor_use(space, table)
        shared = overlap(use, space.rank)
        centres = places(space, perplexity, config.seed)
        return Map(
            layer=layer,
            side=side,
            index=index,
            space=space,
            points=spread(centres, space.group, labels),
            separation=separation(
                space, labels, len(chosen), neighbours, config.tsne.permutations, config.seed
            ),
            use=use,
            overlap=shared,
            similarity=mean_similarity(space, table),
            matching=match_pairs(shared, pairs, config.seed),
        )

    wanted = [(layer, side) for side in dict.fromkeys(config.tsne.sides) for layer in drawn]
    each = [make_map(layer, side) for layer, side in with_bar(wanted, "drawing the maps", console)]
    notes = _notes(config, adapter, chosen, sizes, perplexity, neighbours)
    return Maps(chosen, labels, records, each, perplexity, neighbours, notes)


def _notes(
    config: TsneConfig,
    adapter: MixLoraConfig,
    chosen: Sequence[Instances],
    sizes: Sequence[int],
    perplexity: float,
    neighbours: int,
) -> list[str]:
    settings, notes = config.tsne, []
    small = [f"{one.task} {one.available}" for one in chosen if one.available < settings.instances]
    fewer = [
        f"{one.task} {size}"
        for one, size in zip(chosen, sizes, strict=True)
        if size < min(settings.instances, one.available)
    ]
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
    if adapter.router.source == "chance":
        notes.append(
            f"routing=random: chance selects, here with seed {settings.routing_seed}; no input changes it"
        )
    elif adapter.router.source == "task":
        notes.append("routing=task: all instances of a task have one selection, so they share one place")
    elif adapter.decode == "step":
        notes.append(
            "decode=step: this adapter selects anew for each decoded token; drawn is the prompt's selection"
        )
    return notes


def fitting_perplexity(wanted: float, num_points: int) -> float:
    """`wanted`, or what so many points allow: t-SNE looks at three times as many neighbours."""
    return min(wanted, max(1.0, (num_points - 1) / 3))


def places(space: Space, perplexity: float, seed: int) -> Floats:
    """(K, 2) place of each selection: the mean of the places that t-SNE gives its instances; the largest extent is 1.

    t-SNE sees every instance, as in the paper, so that a selection that many have weighs as much. It puts identical
    ones on one spot but for a rest that depends on the seed, which the mean takes away.
    """
    if len(space.vectors) == 1:
        return np.zeros((1, 2))
    distance = space.distance[space.group][:, space.group]
    embedding = TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=seed)
    points = embedding.fit_transform(distance)
    sums = np.stack([np.bincount(space.group, points[:, axis]) for axis in (0, 1)], axis=1)
    centres: Floats = sums / np.bincount(space.group)[:, None]
    return centres / float(np.ptp(centres, axis=0).max())


def spread(centres: Floats, group: Ints, labels: Ints) -> Floats:
    """(n, 2) place of each instance in the unit square: that of its selection, moved so that identical ones fill a
    disc, whose area grows with their number.

    Inside a disc the tasks lie side by side like the pieces of a pie.
    """
    points = centres[group]
    step = np.sqrt(_SHARE / (np.pi * len(group)))
    for number in range(len(centres)):
        members = np.flatnonzero(group == number)
        if len(members) == 1:
            continue
        rank = np.arange(len(members))
        angle, radius = rank * _GOLDEN_ANGLE % (2 * np.pi), step * np.sqrt(rank + 0.5)
        offsets = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        # The largest task begins at the right.
        sizes = np.bincount(labels[members])
        order = np.lexsort((labels[members], -sizes[labels[members]]))
        points[members[order]] += offsets[np.argsort(angle, kind="stable")]
    low, high = points.min(axis=0), points.max(axis=0)
    extent = float((high - low).max())
    fitted: Floats = 0.5 + (points - (low + high) / 2) / (extent if extent > 0 else 1.0)
    return fitted


@dataclass(frozen=True)
class BesideChance:
    """One number of a map beside what it is when the task labels are shuffled."""

    value: float
    mean: float
    """Over the shuffles."""
    low: float
    """The middle 95 percent of the shuffles begin here."""
    high: float
    p: float
    """Share of shuffles that reach the value, itself counted among them: (1 + count) / (1 + shuffles)."""
    by_task: tuple[float, ...] = ()
    """Means over each task's instances, where the number is a mean over instances."""


def separation(
    space: Space, labels: Ints, num_tasks: int, neighbours: int, shuffles: int, seed: int
) -> dict[str, BesideChance]:
    """How far selections tell tasks apart, against seeded shuffles of `labels` (n,)."""
    distance, shared, rank = space.distance, space.shared, space.rank

    def mean_of(cells: Callable[[Floats], Floats]) -> Callable[[Ints], tuple[float, tuple[float, ...]]]:
        def mean(chosen: Ints) -> tuple[float, tuple[float, ...]]:
            table = space.table(chosen, num_tasks)
            sums, sizes = (cells(table) * table).sum(axis=0), table.sum(axis=0)
            return float(sums.sum() / sizes.sum()), tuple(float(x) for x in sums / sizes)

        return mean

    measures: dict[str, Callable[[Ints], tuple[float, tuple[float, ...]]]] = {
        SILHOUETTE: mean_of(lambda table: silhouettes(distance, table)),
        KNN_PURITY: mean_of(lambda table: knn_purity(shared, rank, table, neighbours)),
        INFORMATION: lambda chosen: (float(normalized_mutual_info_score(chosen, space.group)), ()),
    }
    generator = np.random.default_rng(seed)
    shuffled = [generator.permutation(labels) for _ in range(shuffles)]
    found = {}
    for name, measure in measures.items():
        value, by_task = measure(labels)
        chance = np.array([measure(chosen)[0] for chosen in shuffled])
        low, high = np.percentile(chance, (2.5, 97.5))
        p = (1 + int((chance >= value - 1e-12).sum())) / (1 + len(chance))
        found[name] = BesideChance(value, float(chance.mean()), float(low), float(high), p, by_task)
    return found


def silhouettes(distance: Floats, table: Floats) -> Floats:
    """Silhouette (K, T) of an instance by its selection and its task: (b - a) / max(a, b), 0 in a task of one.

    a is the mean distance to the others of its task, b the least mean distance to the instances of another task
    (Rousseeuw, 1987).

    Args:
        distance: (K, K) between selections.
        table: (K, T) counts.
    """
    sizes = table.sum(axis=0)
    sums = distance @ table
    own = sums / np.maximum(sizes - 1, 1)
    means = sums / sizes
    num_tasks = table.shape[1]
    nearest = np.stack([np.delete(means, task, axis=1).min(axis=1) for task in range(num_tasks)], axis=1)
    larger = np.maximum(own, nearest)
    with np.errstate(invalid="ignore"):
        value = np.where(larger > 0, (nearest - own) / larger, 0.0)
    return np.where(sizes > 1, value, 0.0)


def knn_purity(shared: Ints, rank: int, table: Floats, neighbours: int) -> Floats:
    """Share (K, T) of an instance's k nearest others that are of its task.

    Jaccard distance falls with the factors in common, of which there are 0 to r: many others are equally far. Of
    those that tie for the last places each has the same chance of one, and the mean over these chances is given.

    Args:
        shared: (K, K) factors in common.
        rank: r.
        table: (K, T) counts.
        neighbours: k, fewer than there are instances.
    """
    taken, same = np.zeros((len(table), 1)), np.zeros_like(table)
    for common in range(rank, -1, -1):
        level = (shared == common).astype(np.float64) @ table
        # Nobody is a neighbour of himself; he would be among those with all r factors in common. The number of
        # others is one for all tasks of a row: oneself is left out of it once.
        itself = float(common == rank)
        others = level.sum(axis=1, keepdims=True) - itself
        room = np.clip(neighbours - taken, 0, others)
        same += (level - itself) * np.divide(room, others, out=np.zeros_like(room), where=others > 0)
        taken += room
    return same / neighbours


def factor_use(space: Space, table: Floats) -> Floats:
    """(T, E) share of each task's instances that select a factor; a row sums to r."""
    use: Floats = table.T @ space.vectors / table.sum(axis=0)[:, None]
    return use


def overlap(use: Floats, rank: int) -> Floats:
    """(T, T) sum over factors of the lesser of two tasks' use, over r: 0 = no factor in common, 1 = the same use."""
    shared: Floats = np.minimum(use[:, None, :], use[None, :, :]).sum(axis=2) / rank
    return shared


def mean_similarity(space: Space, table: Floats) -> Floats:
    """(T, T) mean Jaccard similarity of an instance of one task and one of another; within a task, of two others.

    nan within a task of one instance.
    """
    sums = table.T @ (1 - space.distance) @ table
    sizes = table.sum(axis=0)
    counts = np.outer(sizes, sizes)
    np.fill_diagonal(sums, sums.diagonal() - sizes)
    np.fill_diagonal(counts, counts.diagonal() - sizes)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


@dataclass(frozen=True)
class Matching:
    """Whether unseen tasks use the factors of their seen partners more than those of the other pairs' seen tasks."""

    partner: float
    """Mean overlap of partners."""
    others: float
    """Mean overlap with the seen tasks of the other pairs."""
    nearest: int
    """Unseen tasks whose partner is the seen task of the largest overlap; a tie counts."""
    count: int
    """P."""
    p: float
    """Share of all ways to match them whose mean overlap reaches that of the given one."""


def match_pairs(shared: Floats, pairs: Sequence[tuple[int, int]], seed: int) -> Matching | None:
    """Of `overlap` (T, T) and the (seen, unseen) numbers of P pairs; None for a single pair, which proves nothing."""
    if len(pairs) < 2:
        return None
    seen, unseen = (np.array(side) for side in zip(*pairs, strict=True))
    grid = shared[np.ix_(unseen, seen)]
    count = len(pairs)
    rows = np.arange(count)
    if factorial(count) <= _ALL_MATCHINGS:
        ways = np.array(list(permutations(range(count))))
        extra = 0
    else:
        generator = np.random.default_rng(seed)
        ways = np.stack([generator.permutation(count) for _ in range(_ALL_MATCHINGS)])
        extra = 1  # the given one is not among the draws
    means = grid[rows, ways].mean(axis=1)
    value = float(grid.diagonal().mean())
    reached = int((means >= value - 1e-12).sum()) + extra
    return Matching(
        partner=value,
        others=float(grid[~np.eye(count, dtype=bool)].mean()),
        nearest=int((grid.diagonal() >= grid.max(axis=1) - 1e-12).sum()),
        count=count,
        p=reached / (len(ways) + extra),
    )
