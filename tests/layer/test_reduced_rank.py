"""One layer at a rank: errors in the metric that is asked for, biases that centre, curves that are true."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from strategies import seeds

from pysolve.correlations import Correlations
from pysolve.forms import LowRank
from pysolve.layer import spatial
from pysolve.layer.reduced_rank import error_curve, factor_layer, seen_through
from pysolve.layer.spatial import as_kernels
from pysolve.solve.least_squares import prior_ridge

KERNELS = [(), (3,), (2, 3), (3, 1), (2, 1, 2)]


def layer(seed, h=4, c=3, kernel=(), n=200, noise=0.3):
    """Weights as a matrix, and samples of what they read and should give."""
    rng = np.random.default_rng(seed)
    d = c * int(np.prod(kernel))
    x = rng.standard_normal((n, d)) @ (rng.standard_normal((d, d)) / d**0.5) + rng.standard_normal(d)
    W = rng.standard_normal((h, d))
    y = x @ W.T + rng.standard_normal(h) + noise * rng.standard_normal((n, h))
    return W, x, y, Correlations.from_samples(x, y)


def metric(seed, h):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((h, h)) * np.geomspace(1, 30, h)
    return A @ A.T + 0.1 * np.eye(h)


def lost(found, x, y, S=None):
    """E (y − M x − b)ᵀ S (y − M x − b), over the samples themselves."""
    e = y - x @ found.weight.T - found.bias
    return float(np.einsum("ni,ij,nj->n", e, np.eye(y.shape[1]) if S is None else S, e).mean())


@given(seeds, st.sampled_from(KERNELS), st.integers(1, 3), st.booleans(), st.booleans())
def test_weight_and_factors_are_the_same_layer(seed, kernel, rank, known, along):
    W, _, _, correlations = layer(seed, kernel=kernel)
    along = along and kernel == (2, 3)
    found = factor_layer(W, correlations if known else None, rank, kernel=kernel, spatial=along)
    assert found.form.rank == rank
    assert found.form.shape == (4, 3, *kernel)
    np.testing.assert_allclose(found.form.dense().reshape(W.shape), found.weight, atol=1e-12)
    if not along:
        assert found.form.inner.shape == (rank, 3, *kernel)
        assert found.form.outer.shape == (4, rank, *[1] * len(kernel))


@given(seeds, st.integers(1, 4))
def test_the_error_is_the_samples_and_the_bias_centres_them(seed, rank):
    W, x, y, known = layer(seed)
    found = factor_layer(W, known, rank)
    e = y - x @ found.weight.T - found.bias
    np.testing.assert_allclose(e.mean(0), 0, atol=1e-10)
    share = np.square(e).sum() / np.square(y - y.mean(0)).sum()
    assert found.error == pytest.approx(share, rel=1e-9, abs=1e-12)


@given(seeds, st.sampled_from([(), (2, 3)]), st.integers(1, 4))
def test_without_data_the_error_is_the_weight_s(seed, kernel, rank):
    W, *_ = layer(seed, kernel=kernel)
    found = factor_layer(W, None, rank, kernel=kernel, spatial=bool(kernel))
    assert found.bias is None
    assert found.error == pytest.approx(np.square(W - found.weight).sum() / np.square(W).sum(), abs=1e-12)


@given(seeds, st.sampled_from([(), (2, 3)]), st.integers(1, 3))
def test_data_make_outputs_better_and_weights_worse(seed, kernel, rank):
    W, _, _, known = layer(seed, kernel=kernel)
    blind, seeing = (factor_layer(W, one, rank, kernel=kernel, spatial=bool(kernel)) for one in (None, known))
    own = known.centered()
    ridge = prior_ridge(len(own.xx), own.count) * np.diag(own.r_xx)
    errors = [own.error(M) + 0.5 * (ridge * np.square(M - W)).sum() for M in (seeing.weight, blind.weight)]
    assert errors[0] <= errors[1] * (1 + 1e-9)
    assert np.square(W - blind.weight).sum() <= np.square(W - seeing.weight).sum() + 1e-9


@given(seeds, seeds, st.integers(1, 3), st.sampled_from([20, 1000]))
# Two inputs all but repeat each other: at the plain error, the fit in the metric is nearer to the weights.
@example(6919, 247, 2, 1000)
def test_a_metric_makes_the_error_in_it_smaller(seed, other, rank, n):
    W, x, y, known = layer(seed, n=n)
    S = metric(other, 4)
    weighed, plain = (factor_layer(W, known, rank, metric=one) for one in (S, None))
    ridge = prior_ridge(3, n) * x.var(0)

    def cost(found, own):
        moved = found.weight - W
        return lost(found, x, y, own) + float(np.einsum("hj,hg,gj,j->", moved, own, moved, ridge))

    # Held to the old weights, in either metric.
    assert cost(weighed, S) <= cost(plain, S) * (1 + 1e-9)
    assert cost(plain, np.eye(4)) <= cost(weighed, np.eye(4)) * (1 + 1e-9)


def test_a_metric_makes_the_error_of_spatial_factors_in_it_smaller():
    gains = []
    for seed in range(12):
        W, x, y, known = layer(seed, kernel=(2, 3), n=1000)
        S = metric(seed, 4)
        two = (factor_layer(W, known, 2, kernel=(2, 3), spatial=True, metric=one) for one in (S, None))
        weighed, plain = (lost(found, x, y, S) for found in two)
        gains.append(plain / weighed)
    # Each of them is a local minimum.
    assert min(gains) > 0.95
    assert np.mean(gains) > 1.2


@given(seeds, st.sampled_from([(), (3,), (2, 3)]), st.integers(1, 4), st.booleans(), st.floats(0.1, 10))
def test_a_metric_in_which_all_outputs_count_alike_changes_nothing(seed, kernel, rank, along, scale):
    along = along and len(kernel) == 2
    W, _, _, known = layer(seed, kernel=kernel)
    found, plain = (
        factor_layer(W, known, rank, kernel=kernel, spatial=along, metric=one)
        for one in (scale * np.eye(4), None)
    )
    np.testing.assert_allclose(found.weight, plain.weight, atol=1e-4 if along else 1e-8)
    np.testing.assert_allclose(found.bias, plain.bias, atol=1e-4 if along else 1e-8)
    assert found.error == pytest.approx(plain.error, rel=1e-5, abs=1e-9)


@given(seeds, seeds)
def test_a_metric_means_nothing_to_a_layer_of_full_rank_or_without_data(seed, other):
    W, _, _, known = layer(seed)
    S = metric(other, 4)
    full, plain = (factor_layer(W, known, min(W.shape), metric=one) for one in (S, None))
    np.testing.assert_allclose(full.weight, plain.weight, atol=1e-6)
    blind = factor_layer(W, None, 2, metric=S)
    np.testing.assert_array_equal(blind.weight, factor_layer(W, None, 2).weight)


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_in_a_metric_it_is_what_brute_force_finds(seed, along):
    kernel, (h, c, r) = ((2, 2), (2, 1, 1)) if along else ((), (3, 3, 1))
    W, x, y, known = layer(seed, h=h, c=c, kernel=kernel, n=4000)
    S, rng = metric(seed, h), np.random.default_rng(seed)
    j = kernel[1] if along else 1
    shapes = (h * j, r), (r, W.shape[1] // j)
    split = shapes[0][0] * r

    def matrix(v):
        form = LowRank(v[:split].reshape(shapes[0]), v[split:].reshape(shapes[1]))
        return (as_kernels(form, kernel) if along else form).dense().reshape(W.shape)

    own = known.centered()

    def value(v):
        M = matrix(v)
        return np.vdot(S @ M, M @ own.r_xx - 2 * own.r_yx) + np.vdot(S, own.r_yy)

    best = min(
        minimize(value, rng.standard_normal(split + shapes[1][0] * shapes[1][1])).fun for _ in range(6)
    )
    found = factor_layer(W, known, r, kernel=kernel, spatial=along, metric=S)
    # A local minimum of the spatial problem may not be the best one.
    assert lost(found, x, y, S) <= best * (1.1 if along else 1.001)
    assert lost(found, x, y, S) >= best * 0.999


@given(seeds, st.sampled_from(KERNELS), st.booleans(), st.booleans())
def test_the_curve_says_what_each_rank_loses(seed, kernel, known, weighed):
    W, x, y, correlations = layer(seed, kernel=kernel, noise=0.0, n=4000)
    S = metric(seed, 4) if weighed else None
    given_data = correlations if known else None
    most = min(W.shape)
    curve = error_curve(W, given_data, most, kernel=kernel, metric=S)
    assert len(curve) == most + 1
    assert np.all(np.diff(curve) <= 1e-12)
    assert curve[0] == pytest.approx(1.0)
    for rank in range(1, most + 1):
        found = factor_layer(W, given_data, rank, kernel=kernel, metric=S)
        if not known:
            assert found.error == pytest.approx(curve[rank], abs=1e-10)
        else:
            e, z = y - x @ found.weight.T - found.bias, y - y.mean(0)
            own = np.eye(4) if S is None else S
            share = np.vdot(e @ own, e) / np.vdot(z @ own, z)
            # The ridge towards the old weights counts a little, too.
            assert share == pytest.approx(curve[rank], rel=1e-2, abs=1e-3)


@given(seeds, st.booleans(), st.booleans())
@settings(max_examples=20)
def test_the_curve_of_spatial_factors_is_right_halfway_and_never_rises(seed, known, weighed):
    W, _, _, correlations = layer(seed, kernel=(2, 3), noise=0.0, n=1000)
    given_data = correlations if known else None
    S = metric(seed, 4) if weighed else None
    most = 5
    curve = error_curve(W, given_data, most, kernel=(2, 3), spatial=True, metric=S)
    assert len(curve) == most + 1
    assert np.all(np.diff(curve) <= 1e-12)
    assert np.all((curve >= 0) & (curve <= 1))
    if not weighed:
        halfway = factor_layer(W, given_data, most // 2, kernel=(2, 3), spatial=True).error
        assert curve[most // 2] == pytest.approx(halfway, rel=1e-6, abs=1e-12)


@given(seeds, seeds)
def test_correlations_seen_through_a_map_are_those_of_the_mapped_outputs(seed, other):
    W, x, y, known = layer(seed)
    A = np.random.default_rng(other).standard_normal((4, 4))
    found = seen_through(A, W, known)
    mapped = Correlations.from_samples(x, y @ A.T).centered()
    for part in ("xx", "yx", "yy"):
        scale = np.abs(getattr(mapped, part)).max()
        np.testing.assert_allclose(getattr(found, part), getattr(mapped, part), atol=1e-9 * scale)


@pytest.mark.parametrize("along", [False, True])
def test_targets_of_which_only_the_squares_are_known_are_fitted_all_the_same(along):
    kernel = (2, 3) if along else ()
    W, _, _, known = layer(0, kernel=kernel)
    squares = Correlations(
        known.xx, known.yx, np.diag(np.diag(known.yy)), known.count, known.x_sum, known.y_sum
    )
    S = metric(0, 4)
    for weighed in (None, S):
        whole, some = (
            factor_layer(W, one, 2, kernel=kernel, spatial=along, metric=weighed) for one in (known, squares)
        )
        np.testing.assert_allclose(some.weight, whole.weight, atol=1e-8)
        assert some.error == pytest.approx(whole.error)


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_layers_that_do_nothing_stay_that_way(known, along):
    kernel = (2, 3) if along else ()
    d = 3 * int(np.prod(kernel))
    x = np.random.default_rng(0).standard_normal((50, d))
    W = np.zeros((4, d))
    correlations = Correlations.from_samples(x, np.full((50, 4), 2.0)) if known else None
    for S in (None, metric(0, 4)):
        found = factor_layer(W, correlations, 2, kernel=kernel, spatial=along, metric=S)
        assert not found.weight.any()
        assert found.error == 0
        assert known == (found.bias is not None)
        if known:
            np.testing.assert_allclose(found.bias, 2.0)
        curve = error_curve(W, correlations, 2, kernel=kernel, spatial=along, metric=S)
        assert np.isfinite(curve).all()


def test_inputs_that_never_change_leave_the_outputs_their_mean():
    W, x = np.random.default_rng(0).standard_normal((4, 6)), np.ones((50, 6))
    known = Correlations.from_samples(x, x @ W.T)
    for kernel, along in (((), False), ((2, 3), True)):
        found = factor_layer(W, known, 1, kernel=kernel, spatial=along)
        np.testing.assert_allclose(x @ found.weight.T + found.bias, x @ W.T)


def test_spatial_refits_are_part_of_it(monkeypatch):
    W, _, _, known = layer(0, kernel=(3, 3), n=2000)
    found = factor_layer(W, known, 3, kernel=(3, 3), spatial=True)
    monkeypatch.setattr(spatial, "ROUNDS", 0)
    assert found.error < factor_layer(W, known, 3, kernel=(3, 3), spatial=True).error
