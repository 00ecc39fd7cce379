"""Scores of channels are what their names say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from pysolve.layer.scores import channel_norms, propagated_importance


@given(seeds, st.sampled_from([1, 2, 3, np.inf]), st.sampled_from([0, 1]))
def test_norms_are_those_of_each_channel(seed, n, axis):
    w = np.random.default_rng(seed).standard_normal((3, 4, 2, 2))
    wanted = [np.linalg.norm(w.take(c, axis).ravel(), n) for c in range(w.shape[axis])]
    np.testing.assert_allclose(channel_norms(w, n=n, axis=axis), wanted)


def test_norms_neither_overflow_nor_divide_by_zero():
    np.testing.assert_allclose(channel_norms([[3e200, 4e200], [0, 0]]), [5e200, 0])
    np.testing.assert_array_equal(channel_norms(np.zeros((2, 0))), [0, 0])
    with pytest.raises(ValueError, match="order of the norm, must be a positive number, got 0"):
        channel_norms([[1.0]], n=0)


@given(seeds)
def test_importance_runs_back_through_every_path(seed):
    rng = np.random.default_rng(seed)
    one, two, three = (rng.standard_normal(shape) for shape in ((3, 2), (4, 3), (2, 4)))
    final = rng.random(2)
    first, second, last = propagated_importance([one, two, three], final)
    np.testing.assert_allclose(last, final)
    for j in range(4):
        assert second[j] == pytest.approx(sum(final[k] * abs(three[k, j]) for k in range(2)))
    for i in range(3):
        assert first[i] == pytest.approx(sum(second[j] * abs(two[j, i]) for j in range(4)))


def test_importance_of_a_channel_is_that_of_all_its_taps_and_positions():
    conv, following, linear = np.ones((2, 1, 3, 3)), np.ones((3, 2, 2, 2)), np.ones((1, 3 * 5))
    linear[0, 5:10] = -2.0
    first, second, _ = propagated_importance([conv, following, linear])
    assert second.tolist() == [5.0, 10.0, 5.0]
    assert first.tolist() == [80.0, 80.0]


def test_products_that_are_no_finite_numbers_are_refused():
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="no finite numbers"):
        propagated_importance([np.full((2, 2), 1e200)] * 3)


def test_layers_that_are_no_chain_are_refused():
    with pytest.raises(ValueError, match="3 outputs is followed by one of 4 inputs"):
        propagated_importance([np.ones((3, 2)), np.ones((2, 4))])
    with pytest.raises(ValueError, match="at least one layer"):
        propagated_importance([])
    with pytest.raises(ValueError, match="final must be 2 numbers"):
        propagated_importance([np.ones((2, 2))], [1.0, -1.0])
