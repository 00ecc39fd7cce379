"""Shared values: k-means of the weights, zero kept, and the best values for given codes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from pysolve.layer.codebooks import SharedValues, share_values
from pysolve.layer.rounding import Target


@st.composite
def layers(draw):
    rng = np.random.default_rng(draw(seeds))
    h, d = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    x = rng.standard_normal((2 * d, d)) * np.exp(rng.standard_normal(d))
    mask = rng.random((h, d)) < 0.6 if draw(st.booleans()) else None
    V = rng.standard_normal((h, d)) * (1 if mask is None else mask)
    return Target(V, x.T @ x / len(x) if draw(st.booleans()) else None, mask)


@given(layers(), st.integers(2, 16))
def test_values_are_at_most_as_many_and_zero_is_the_first_where_weights_are_pruned(target, size):
    shared = share_values(target.V, size, mask=target.mask)
    assert 1 <= len(shared.centroids) <= size
    assert shared.zero == (target.mask is not None)
    if shared.zero:
        assert shared.centroids[0] == 0.0
    codes = shared.codes(target.V)
    distances = np.abs(target.V[..., None] - shared.centroids)
    assert np.allclose(np.abs(shared.values(codes) - target.V), distances.min(-1), atol=1e-12)


@given(layers(), st.integers(2, 8), st.booleans())
def test_refitted_values_solve_the_normal_equations(target, size, zero):
    shared = share_values(target.V, size, mask=target.mask, zero=zero)
    codes = shared.codes(target.V)
    if target.mask is not None:
        codes = np.where(target.mask, codes, 0)
    k, free = len(shared.centroids), slice(int(shared.zero), None)
    fitted = shared.refit(codes, target)
    # The k × k equations, written out.
    A = np.eye(target.V.shape[1]) if target.A is None else target.A
    one_hot = (codes[..., None] == np.arange(k)).astype(float)
    N = np.einsum("ija,jl,ilb->ab", one_hot, A, one_hot)[free, free]
    b = np.einsum("ija,jl,il->a", one_hot, A, target.V)[free]
    slope = N @ fitted.centroids[free] - b
    assert np.abs(slope).max(initial=0.0) <= 1e-5 * (1 + np.abs(b).max(initial=0.0))
    assert target.loss(fitted.values(codes)) <= target.loss(shared.values(codes)) * (1 + 1e-6) + 1e-12
    if shared.zero:
        assert fitted.centroids[0] == 0.0


def test_values_that_no_weight_takes_stay():
    shared = SharedValues(np.array([1.0, 2.0, 9.0]))
    target = Target(np.array([[1.5, 1.5, 2.5]]), None, None)
    fitted = shared.refit(np.array([[0, 0, 1]]), target)
    assert fitted.centroids == pytest.approx([1.5, 2.5, 9.0])


def test_weights_that_count_more_draw_values_to_them():
    W = np.array([[0.0, 1.0, 10.0, 11.0]])
    even, uneven = (share_values(W, 2, weights=w).centroids for w in (None, np.array([1.0, 3.0, 1.0, 1.0])))
    assert even == pytest.approx([0.5, 10.5])
    assert uneven == pytest.approx([0.75, 10.5])


def test_a_layer_without_any_weight_left_has_zero_alone():
    shared = share_values(np.zeros((2, 2)), 4, mask=np.zeros((2, 2), bool))
    assert np.array_equal(shared.centroids, [0.0])
    assert len(share_values(np.zeros((0, 3)), 4).centroids) == 1
