"""Places on a map: distinct selections apart, identical ones on discs whose area counts them, all of it seeded."""

from __future__ import annotations

import numpy as np
import pytest

from mixlora_cli.analysis.selections.figures import in_legend_order, styles_of
from mixlora_cli.analysis.selections.maps import fitting_perplexity, make_space, places, spread
from mixlora_cli.plots import HUES


def test_perplexity_fits_the_number_of_points() -> None:
    assert fitting_perplexity(30, 2100) == 30
    assert fitting_perplexity(30, 31) == 10
    assert fitting_perplexity(30, 3) == 1


def test_clusters_of_selections_are_clusters_of_places() -> None:
    generator = np.random.default_rng(0)
    halves = np.repeat([0, 4], 30)
    index = np.array([half + generator.choice(4, 3, replace=False) for half in halves])
    space = make_space(index, 8)
    centres = places(space, perplexity=10, seed=0)
    np.testing.assert_array_equal(centres, places(space, perplexity=10, seed=0))
    which = space.vectors[:, :4].sum(axis=1) > 0
    middle = centres[which].mean(axis=0), centres[~which].mean(axis=0)
    apart = np.linalg.norm(middle[0] - middle[1])
    within = max(
        np.linalg.norm(centres[side] - centre, axis=1).max()
        for side, centre in zip((which, ~which), middle, strict=True)
    )
    assert apart > 2 * within
    assert np.ptp(centres, axis=0).max() == pytest.approx(1)


def test_one_selection_alone_has_a_place() -> None:
    assert places(make_space(np.tile([0, 1], (9, 1)), 4), perplexity=2, seed=0).tolist() == [[0, 0]]


def test_identical_selections_fill_discs() -> None:
    group = np.array([0] * 40 + [1] * 10 + [2])
    labels = np.array([0] * 20 + [1] * 20 + [0] * 11)
    centres = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    points = spread(centres, group, labels)
    assert points.min() >= 0 and points.max() <= 1 and np.ptp(points, axis=0).max() == pytest.approx(1)
    assert len(np.unique(points.round(9), axis=0)) == len(points)
    radii = [
        np.linalg.norm(points[group == g] - points[group == g].mean(axis=0), axis=1).max() for g in (0, 1)
    ]
    assert radii[0] ** 2 / radii[1] ** 2 == pytest.approx(4, rel=0.35)
    # The two tasks of the large disc are its two halves.
    first, second = points[:20], points[20:40]
    assert np.linalg.norm(first.mean(axis=0) - second.mean(axis=0)) > 0.6 * radii[0]


def test_styles() -> None:
    many = styles_of([f"t{n}" for n in range(20)], None)
    assert len(set(many.values())) == 20
    pairs = [["a", "x"], ["b", "y"], ["a", "z"]]
    styles = styles_of(["a", "b", "x", "y", "z"], pairs)
    assert (styles["a"].colour, styles["b"].colour) == HUES[:2]
    assert styles["x"] == styles["z"] != styles["y"]
    assert styles["x"].colour == "#80b8d8" and styles["x"].marker != styles["a"].marker
    assert in_legend_order(["a", "b", "x", "y", "z"], pairs) == ["a", "x", "b", "y", "z"]
