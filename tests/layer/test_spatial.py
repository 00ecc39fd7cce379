"""A convolution as two along height and width: the same as both of them, and refits that never do worse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch.nn.functional import conv2d

from pysolve.correlations import Correlations
from pysolve.layer import spatial
from pysolve.layer.spatial import as_kernels, plain_spatial, refitted, spatial_spectrum, unfolded
from pysolve.solve.least_squares import prior_ridge


@st.composite
def convolutions(draw):
    """(h, c·i·j) weights, their kernel, and correlations of the patches of images that hang together."""
    rng = np.random.default_rng(draw(seeds))
    h, c = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    kernel = draw(st.integers(2, 3)), draw(st.integers(2, 3))
    size = c * kernel[0] * kernel[1]
    n = draw(st.sampled_from([2, size, 6 * size]))
    mix = rng.standard_normal((size, size)) if draw(st.booleans()) else np.ones((size, 1))
    x = rng.standard_normal((n, mix.shape[1])) @ mix.T + draw(st.sampled_from([0.0, 2.0]))
    if draw(st.booleans()):
        x[:, rng.integers(size)] = 0.0
    W = rng.standard_normal((h, size))
    y = x @ W.T + draw(st.sampled_from([0.0, 0.3])) * rng.standard_normal((n, h)) + 1.0
    return W, kernel, Correlations.from_samples(x, y)


def matrix_of(form, kernel):
    """The (h, c·i·j) matrix of factors (h·j, r) and (r, c·i), entry by entry."""
    i, j = kernel
    product = form.outer @ form.inner
    h, c = len(product) // j, product.shape[1] // i
    W = np.zeros((h, c, i, j))
    for row, column in np.ndindex(product.shape):
        W[row // j, column // i, column % i, row % j] = product[row, column]
    return W.reshape(h, -1)


def objective(form, W, known, kernel):
    """½ E‖y − M x − b‖² + ½ ε Σ_j R_jj ‖M_j − W_j‖²."""
    own, M = known.centered(), matrix_of(form, kernel)
    ridge = prior_ridge(len(own.xx), own.count) * np.diag(own.r_xx)
    return own.error(M) + 0.5 * float((ridge * np.square(M - W)).sum())


def most(W, kernel):
    return min(unfolded(W, kernel).shape)


@given(convolutions(), st.integers(1, 6))
def test_two_convolutions_are_the_one_that_their_product_is(case, rank):
    W, kernel, _ = case
    form = plain_spatial(W, kernel).factors(min(rank, most(W, kernel)))
    two = as_kernels(form, kernel)
    assert two.outer.shape[2:] == (1, kernel[1])
    assert two.inner.shape[2:] == (kernel[0], 1)
    np.testing.assert_allclose(two.dense().reshape(len(W), -1), matrix_of(form, kernel), atol=1e-12)
    x = torch.randn(2, two.shape[1], 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outer, inner, dense = (torch.from_numpy(one) for one in (two.outer, two.inner, two.dense()))
    torch.testing.assert_close(conv2d(conv2d(x, inner), outer), conv2d(x, dense))


@given(convolutions())
def test_unfolding_keeps_every_number(case):
    W, kernel, _ = case
    form = plain_spatial(W, kernel).factors(most(W, kernel))
    np.testing.assert_allclose(form.outer @ form.inner, unfolded(W, kernel), atol=1e-10)
    np.testing.assert_allclose(matrix_of(form, kernel), W, atol=1e-10)


@given(convolutions())
def test_without_data_nothing_of_the_rank_is_nearer(case):
    W, kernel, _ = case
    sizes = np.linalg.svd(unfolded(W, kernel), compute_uv=False)
    for rank in range(1, len(sizes) + 1):
        M = matrix_of(plain_spatial(W, kernel).factors(rank), kernel)
        assert np.square(W - M).sum() == pytest.approx(np.square(sizes[rank:]).sum(), abs=1e-10)


@given(convolutions(), st.integers(1, 6))
def test_no_round_of_refits_raises_the_error(case, rank):
    W, kernel, known = case
    form = spatial_spectrum(W, known, kernel).factors(min(rank, most(W, kernel)))
    errors = [objective(form, W, known, kernel)]
    with pytest.MonkeyPatch.context() as patch:
        for rounds in range(1, 5):
            patch.setattr(spatial, "ROUNDS", rounds)
            errors.append(objective(refitted(form, W, known, kernel), W, known, kernel))
    zero = objective(plain_spatial(np.zeros_like(W), kernel).factors(1), W, known, kernel)
    assert np.all(np.diff(errors) <= 1e-9 * zero + 1e-12)


@given(convolutions(), st.integers(1, 6))
def test_no_small_change_of_the_factor_that_was_fitted_last_lowers_the_error(case, rank):
    W, kernel, known = case
    form = refitted(spatial_spectrum(W, known, kernel).factors(min(rank, most(W, kernel))), W, known, kernel)
    own = objective(form, W, known, kernel)
    zero = objective(plain_spatial(np.zeros_like(W), kernel).factors(1), W, known, kernel)
    rng = np.random.default_rng(0)
    for size in (1e-4, 1e-2):
        change = size * rng.standard_normal(form.outer.shape) * np.abs(form.outer).max()
        other = type(form)(form.outer + change, form.inner)
        assert objective(other, W, known, kernel) >= own - 1e-9 * zero - 1e-12


@given(convolutions())
def test_full_rank_reproduces_what_the_layer_does(case):
    W, kernel, known = case
    own = known.centered()
    own = Correlations(own.xx, W @ own.xx, W @ own.xx @ W.T, own.count, own.x_sum, own.y_sum)
    rank = most(W, kernel)
    form = refitted(spatial_spectrum(W, own, kernel).factors(rank), W, own, kernel)
    energy = float(np.trace(own.r_yy))
    assert 2 * own.error(matrix_of(form, kernel)) <= 1e-8 * energy + 1e-12


@given(convolutions(), st.integers(1, 2))
def test_a_weight_of_the_rank_is_reproduced(case, rank):
    W, kernel, known = case
    form = plain_spatial(W, kernel).factors(min(rank, most(W, kernel)))
    W = matrix_of(form, kernel)
    xx = known.centered().xx
    zero = np.zeros(len(xx)), np.zeros(len(W))
    own = Correlations(xx, W @ xx, W @ xx @ W.T, known.count, *zero)
    fitted = refitted(spatial_spectrum(W, own, kernel).factors(form.rank), W, own, kernel)
    assert 2 * own.error(matrix_of(fitted, kernel)) <= 1e-6 * float(np.trace(own.r_yy)) + 1e-12


def test_refits_help_where_columns_hang_together():
    rng = np.random.default_rng(0)
    kernel, (h, c) = (3, 3), (8, 4)
    smooth = np.exp(-0.3 * np.abs(np.arange(c * 9)[:, None] - np.arange(c * 9)))
    x = rng.standard_normal((2000, c * 9)) @ np.linalg.cholesky(smooth).T
    W = rng.standard_normal((h, c * 9))
    known = Correlations.from_samples(x, x @ W.T)
    start = spatial_spectrum(W, known, kernel).factors(5)
    plain = objective(plain_spatial(W, kernel).factors(5), W, known, kernel)
    fitted = objective(refitted(start, W, known, kernel), W, known, kernel)
    assert fitted < 0.9 * objective(start, W, known, kernel)
    assert fitted < 0.7 * plain
