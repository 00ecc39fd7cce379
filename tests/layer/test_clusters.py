"""k-means on a line finds the best clusters there are."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from pysolve.layer import clusters
from pysolve.layer.clusters import k_means, nearest


def cost(values, weights, centres):
    return float(weights @ np.square(values - centres[nearest(values, centres)]))


def least_cost(values, weights, k):
    """Over all ways to cut the sorted values into k runs."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    least = np.inf
    for cuts in combinations(range(1, len(values)), min(k, len(values)) - 1):
        runs = [slice(*ends) for ends in zip((0, *cuts), (*cuts, len(values)), strict=True)]
        total = 0.0
        for run in runs:
            total += weights[run] @ np.square(values[run] - np.average(values[run], weights=weights[run]))
        least = min(least, total)
    return least


@st.composite
def weighted_values(draw):
    rng = np.random.default_rng(draw(seeds))
    n = draw(st.integers(1, 9))
    values = rng.standard_normal(n) * 10.0 ** draw(st.sampled_from([-8, 0, 8]))
    if draw(st.booleans()):
        values = np.round(values / np.abs(values).max() * 3)
    return values, rng.random(n) + 0.01


@given(weighted_values(), st.integers(1, 9))
def test_no_other_clusters_cost_less(given_values, k):
    values, weights = given_values
    found, least = k_means(values, k, weights), least_cost(values, weights, k)
    assert len(found) <= k
    assert (np.diff(found) > 0).all()
    assert cost(values, weights, found) == pytest.approx(least, rel=1e-9, abs=1e-14 * np.square(values).max())


@given(seeds, st.integers(1, 20))
def test_as_many_centres_as_different_values_are_those_values(seed, k):
    values = np.random.default_rng(seed).standard_normal(k).astype(np.float32).astype(float)
    assert np.array_equal(k_means(np.tile(values, 3), k + 2), np.unique(values))


@given(seeds, st.sampled_from([2, 5, 16]))
def test_binned_values_cost_hardly_more_than_exact_ones(seed, k):
    values = np.random.default_rng(seed).laplace(size=3000)
    weights, exact, bins = np.ones(3000), k_means(values, k), clusters.BINS
    try:
        clusters.BINS = 500
        binned = k_means(values, k)
    finally:
        clusters.BINS = bins
    assert cost(values, weights, binned) <= 1.01 * cost(values, weights, exact)
    assert cost(values, weights, exact) <= cost(values, weights, binned) * (1 + 1e-9)


def test_values_without_weight_have_no_say():
    values = np.array([1.0, 2.0, 50.0])
    assert np.allclose(k_means(values, 2, np.array([1.0, 3.0, 0.0])), [1.0, 2.0])
    assert np.allclose(k_means(values, 1, np.array([1.0, 3.0, 1e-300])), [1.75])
    assert np.allclose(k_means(values, 1, np.zeros(3)), values.mean())


def test_nothing_has_no_centres():
    assert k_means(np.zeros(0), 4).shape == (0,)
    assert np.array_equal(k_means(np.full((3, 3), 7.0), 4), [7.0])


@given(seeds, st.integers(1, 6))
def test_nearest_is_the_centre_of_least_distance(seed, k):
    rng = np.random.default_rng(seed)
    values, centres = rng.standard_normal((3, 4)), np.sort(rng.standard_normal(k))
    distances = np.abs(values[..., None] - centres)
    assert np.array_equal(nearest(values, centres), distances.argmin(-1))


def test_outliers_of_next_to_no_weight_leave_the_others_their_centres():
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal(10_000), np.ones(10_000)
    far, faint = np.append(values, [2e6, -1e6]), np.append(weights, [1e-18, 1e-18])
    costs = []
    for centres in (k_means(values, 16, weights), k_means(far, 16, faint)):
        costs.append(np.square(values - centres[nearest(values, centres)]).sum())
    assert costs[1] <= 1.01 * costs[0]
