"""Hand-made selections: where they lie, known values, loops over the definitions, and what chance gives."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import silhouette_samples

from mixlora_cli.analysis.selections.figures import in_legend_order, styles_of
from mixlora_cli.analysis.selections.maps import (
    INFORMATION,
    KNN_PURITY,
    SILHOUETTE,
    Floats,
    Ints,
    Space,
    factor_use,
    fitting_perplexity,
    knn_purity,
    make_space,
    match_pairs,
    mean_similarity,
    overlap,
    places,
    separation,
    silhouettes,
    spread,
)
from mixlora_cli.plots import HUES

NUM_FACTORS, RANK = 8, 3


def example(seed: int = 0, count: int = 60, tasks: int = 3) -> tuple[Ints, Ints]:
    """Selections (n, r) with many ties, and labels (n,) that have something to do with them."""
    generator = np.random.default_rng(seed)
    labels = np.sort(generator.integers(tasks, size=count))
    weights = np.ones((tasks, NUM_FACTORS)) + 4 * np.eye(tasks, NUM_FACTORS)
    index = [
        generator.choice(NUM_FACTORS, RANK, replace=False, p=weights[task] / weights[task].sum())
        for task in labels
    ]
    return np.array(index), labels


def per_instance(cells: Floats, space: Space, labels: Ints) -> Floats:
    return cells[space.group, labels]


def test_vectors_and_distances_by_hand() -> None:
    space = make_space(np.array([[0, 1], [1, 0], [1, 2], [2, 3]]), 4)
    # The order inside a selection does not count.
    assert space.group[0] == space.group[1] and len(space.vectors) == 3
    distance = space.distance[space.group][:, space.group]
    expected = [[0, 0, 2 / 3, 1], [0, 0, 2 / 3, 1], [2 / 3, 2 / 3, 0, 2 / 3], [1, 1, 2 / 3, 0]]
    np.testing.assert_allclose(distance, expected)
    vectors = space.vectors[space.group].astype(int).tolist()
    assert vectors == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_silhouettes_are_those_of_scikit_learn() -> None:
    index, labels = example()
    space = make_space(index, NUM_FACTORS)
    found = per_instance(silhouettes(space.distance, space.table(labels, 3)), space, labels)
    distance = space.distance[space.group][:, space.group]
    np.testing.assert_allclose(found, silhouette_samples(distance, labels, metric="precomputed"), atol=1e-12)
    assert found.std() > 0.05


def test_purity_is_the_mean_over_random_orders_of_ties() -> None:
    index, labels = example(count=40)
    space = make_space(index, NUM_FACTORS)
    found = per_instance(knn_purity(space.shared, RANK, space.table(labels, 3), 7), space, labels)
    distance = space.distance[space.group][:, space.group]
    np.fill_diagonal(distance, np.inf)
    generator, draws = np.random.default_rng(0), 600
    counted = np.zeros(40)
    for _ in range(draws):
        order = np.lexsort((generator.random(distance.shape), distance), axis=1)[:, :7]
        counted += (labels[order] == labels[:, None]).mean(axis=1)
    # 600 draws of a mean of 7: a standard error below 0.01 for each instance.
    np.testing.assert_allclose(counted / draws, found, atol=0.04)
    assert counted.mean() / draws == pytest.approx(found.mean(), abs=0.004)


def test_purity_without_ties_is_a_count() -> None:
    # Distances from the first: 1/2 (task 0), 4/5 (task 1), 1 (task 1).
    index = np.array([[0, 1, 2], [0, 1, 3], [0, 4, 5], [5, 6, 7]])
    labels = np.array([0, 0, 1, 1])
    space = make_space(index, NUM_FACTORS)
    table = space.table(labels, 2)
    for neighbours, expected in ((1, 1.0), (2, 1 / 2), (3, 1 / 3)):
        found = per_instance(knn_purity(space.shared, 3, table, neighbours), space, labels)
        assert found[0] == pytest.approx(expected)


def test_perfect_separation_is_one() -> None:
    index = np.repeat([[0, 1, 2], [3, 4, 5], [5, 6, 7]], 12, axis=0)
    labels = np.repeat([0, 1, 2], 12)
    found = separation(make_space(index, NUM_FACTORS), labels, 3, 10, shuffles=99, seed=0)
    for measured in (found[SILHOUETTE], found[KNN_PURITY], found[INFORMATION]):
        assert measured.value == pytest.approx(1)
        assert measured.p == pytest.approx(0.01)
        assert measured.low <= measured.mean <= measured.high < 0.5
    assert found[KNN_PURITY].by_task == pytest.approx((1, 1, 1))


def test_labels_without_meaning_are_at_chance() -> None:
    index, _ = example(count=120)
    p_values = []
    for seed in range(4):
        labels = np.random.default_rng(100 + seed).integers(3, size=120)
        found = separation(make_space(index, NUM_FACTORS), labels, 3, 10, shuffles=60, seed=seed)
        assert found[KNN_PURITY].value == pytest.approx(1 / 3, abs=0.06)
        assert found[KNN_PURITY].mean == pytest.approx(1 / 3, abs=0.02)
        # With this many distinct selections information is far from 0 by chance alone.
        assert found[INFORMATION].mean > 0.15
        p_values += [found[SILHOUETTE].p, found[KNN_PURITY].p, found[INFORMATION].p]
    assert min(p_values) > 0.02 and sum(p < 0.05 for p in p_values) <= 2


def test_one_selection_for_all_tells_nothing() -> None:
    index, labels = np.tile([0, 1, 2], (20, 1)), np.repeat([0, 1], 10)
    found = separation(make_space(index, NUM_FACTORS), labels, 2, 5, shuffles=20, seed=0)
    assert (found[SILHOUETTE].value, found[SILHOUETTE].p) == (0, 1)
    assert found[KNN_PURITY].value == pytest.approx(9 / 19)
    assert (found[INFORMATION].value, found[INFORMATION].p) == (0, 1)


def test_use_and_overlap_by_hand() -> None:
    index = np.array([[0, 1], [0, 2], [2, 3], [2, 3], [0, 1]])
    labels = np.array([0, 0, 1, 1, 2])
    space = make_space(index, 4)
    table = space.table(labels, 3)
    use = factor_use(space, table)
    np.testing.assert_allclose(use, [[1, 0.5, 0.5, 0], [0, 0, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_allclose(overlap(use, 2), [[1, 0.25, 0.75], [0.25, 1, 0], [0.75, 0, 1]])
    similarity = mean_similarity(space, table)
    # {0,1} and {0,2} have 1 of 3 in common; {0,2} and {2,3} too; {0,1} and {2,3} none.
    np.testing.assert_allclose(similarity[:2, :2], [[1 / 3, 1 / 6], [1 / 6, 1]])
    assert similarity[0, 2] == pytest.approx((1 + 1 / 3) / 2) and np.isnan(similarity[2, 2])


def test_partners_against_all_other_matchings() -> None:
    shared = np.full((6, 6), 0.2)
    pairs = [(0, 3), (1, 4), (2, 5)]
    for seen, unseen in pairs:
        shared[unseen, seen] = 0.9
    found = match_pairs(shared, pairs, seed=0)
    assert found is not None
    assert (found.partner, found.others) == (pytest.approx(0.9), pytest.approx(0.2))
    assert (found.nearest, found.p) == (3, pytest.approx(1 / 6))
    crossed = match_pairs(shared, [(0, 4), (1, 5), (2, 3)], seed=0)
    assert crossed is not None and crossed.nearest == 0 and crossed.p == pytest.approx(5 / 6, abs=0.2)
    assert match_pairs(shared, pairs[:1], seed=0) is None


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
