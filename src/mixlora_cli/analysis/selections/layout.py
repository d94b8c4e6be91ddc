"""Where instances lie on a map: t-SNE of their Jaccard distances, and identical selections spread over a disc."""

from __future__ import annotations

import numpy as np
from sklearn.manifold import TSNE

from mixlora_cli.analysis.selections.space import Floats, Ints, Space

_GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))
_SHARE = 0.12
"""Area that all discs cover together, where the places of the selections extend over 1."""


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
