"""A curve of divergences falls through what was measured, as a power of the error between."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from pysolve.methods.menu import FLOOR, divergence_curve

CURVES = st.lists(st.floats(1e-8, 1.0), min_size=3, max_size=12).map(lambda e: np.sort([*e, FLOOR])[::-1])


@given(CURVES, st.data())
def test_a_curve_never_rises_is_infinite_at_none_and_zero_at_all(error, data):
    channels = len(error) - 1
    sizes = data.draw(st.lists(st.integers(1, channels), min_size=1, max_size=4, unique=True))
    divergences = data.draw(st.lists(st.floats(0, 10.0), min_size=len(sizes), max_size=len(sizes)))
    curve = divergence_curve(error, sizes, divergences)
    assert curve.shape == (channels + 1,)
    assert np.all(curve[:-1] >= curve[1:])
    assert curve[0] == np.inf
    assert curve[-1] == 0.0
    assert np.isfinite(curve[1:]).all()


@given(seeds, st.integers(1, 4))
def test_a_curve_passes_through_measurements_that_do_not_contradict_it(seed, count):
    rng = np.random.default_rng(seed)
    error = np.concatenate([np.cumprod([1.0, *rng.uniform(0.3, 0.95, 9)]), [FLOOR]])
    sizes = np.sort(rng.permutation(np.arange(1, 10))[:count])
    divergences = np.sort(10 ** rng.uniform(-6, 1, count))[::-1]
    curve = divergence_curve(error, sizes, divergences)
    np.testing.assert_allclose(curve[sizes], divergences, rtol=1e-9)


def test_between_measurements_divergence_is_a_power_of_the_error():
    error = np.geomspace(1, 1e-6, 13)
    curve = divergence_curve(error, [2, 6, 9], 5 * error[[2, 6, 9]] ** 1.5)
    np.testing.assert_allclose(curve[1:-1], 5 * error[1:-1] ** 1.5, rtol=1e-9)


@given(CURVES, st.data())
def test_nothing_at_all_bounds_the_curve_and_moves_no_point_of_it_that_is_lower(error, data):
    channels = len(error) - 1
    sizes = data.draw(st.lists(st.integers(1, channels), max_size=4, unique=True))
    divergences = data.draw(st.lists(st.floats(0, 10.0), min_size=len(sizes), max_size=len(sizes)))
    nothing = data.draw(st.floats(0, 10.0))
    curve = divergence_curve(error, [0, *sizes], [nothing, *divergences])
    assert curve[0] == nothing
    assert np.all(curve[:-1] >= curve[1:])
    without = divergence_curve(error, sizes, divergences)
    np.testing.assert_array_equal(curve[1:], np.minimum(without[1:], nothing))


def test_a_single_channel_has_a_curve_without_measurements():
    curve = divergence_curve(np.array([1.0, FLOOR]), [], [])
    np.testing.assert_array_equal(curve, [np.inf, 0.0])


@given(CURVES, st.data())
def test_up_to_a_size_that_makes_no_numbers_none_is_allowed(error, data):
    channels = len(error) - 1
    sizes = data.draw(st.lists(st.integers(1, channels - 1), min_size=1, max_size=3, unique=True))
    worst = data.draw(st.sampled_from(sizes))
    curve = divergence_curve(error, sizes, [np.inf if k == worst else 1.0 for k in sizes])
    assert np.isinf(curve[: worst + 1]).all()
    assert np.isfinite(curve[worst + 1 :]).all()
