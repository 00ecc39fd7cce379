import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import groups_of, prox
from strategies import seeds

import pysolve as ps


@st.composite
def points(draw):
    group_size = draw(st.integers(1, 9))
    shape = (draw(st.integers(1, 5)), group_size * draw(st.integers(1, 5)))
    scale = 10.0 ** draw(st.integers(-8, 8))
    V = np.random.default_rng(draw(seeds)).standard_normal(shape) * scale
    return V, draw(st.floats(0, 5)) * scale, group_size


@given(points())
def test_equals_the_slow_version(case):
    V, t, group_size = case
    np.testing.assert_allclose(
        ps.prox_group_lasso(V, t, group_size=group_size), prox(V, t, group_size), rtol=1e-12, atol=1e-14 * t
    )


@given(points())
def test_is_the_minimiser(case):
    """V − M is t times a subgradient of the norm at M."""
    V, t, group_size = case
    M = ps.prox_group_lasso(V, t, group_size=group_size)
    for v, m in zip(groups_of(V, group_size), groups_of(M, group_size), strict=True):
        norm = np.linalg.norm(m)
        if norm > 0:
            np.testing.assert_allclose(v - m, t * m / norm, rtol=1e-9, atol=1e-12 * np.abs(V).max())
        else:
            assert np.linalg.norm(v) <= t * (1 + 1e-12)


@given(points(), seeds)
def test_does_not_expand_distances(case, seed):
    V, t, group_size = case
    W = V + np.random.default_rng(seed).standard_normal(V.shape) * np.abs(V).max()
    apart = ps.prox_group_lasso(V, t, group_size=group_size) - ps.prox_group_lasso(
        W, t, group_size=group_size
    )
    assert np.linalg.norm(apart) <= np.linalg.norm(V - W) * (1 + 1e-12)


@given(points())
def test_is_the_identity_at_zero(case):
    V, _, group_size = case
    np.testing.assert_array_equal(ps.prox_group_lasso(V, 0.0, group_size=group_size), V)


@given(points())
def test_zero_weights_leave_groups_alone(case):
    V, t, group_size = case
    weights = np.zeros(V.shape[1] // group_size)
    np.testing.assert_array_equal(ps.prox_group_lasso(V, t, group_size=group_size, weights=weights), V)


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e160, 1e200])
def test_survives_squares_that_leave_the_range_of_floats(scale):
    M = ps.prox_group_lasso([[3.0 * scale], [4.0 * scale]], scale)
    np.testing.assert_allclose(M / scale, [[2.4], [3.2]], rtol=1e-12)


def test_input_is_not_written_to():
    V = np.ones((2, 2))
    ps.prox_group_lasso(V, 10.0)
    assert V.min() == 1.0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.ones((2, 3)), 1.0), {"group_size": 2}, "group_size must divide the 3 inputs"),
        ((np.ones((2, 3)), -1.0), {}, "t must be finite and at least 0"),
        ((np.ones((2, 3)), np.nan), {}, "t must be finite"),
        ((np.ones(3), 1.0), {}, "V must be a matrix"),
        ((np.full((2, 2), np.nan), 1.0), {}, "V has 4 entries that are not finite"),
        ((np.ones((2, 2)), 1.0), {"weights": [1.0]}, "one number for each of the 2 groups"),
        ((np.ones((2, 2)), 1.0), {"weights": [1.0, -1.0]}, "at least 0"),
    ],
)
def test_refuses_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ps.prox_group_lasso(*arguments, **options)
