"""Selection at one site does what a direct fit on the samples does; refits fulfil what they state."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import correlated_samples, seeds

from pysolve.correlations import Correlations
from pysolve.methods.kinds.channels import reader_columns, site_menu, site_problem
from pysolve.methods.menu import FLOOR
from pysolve.nn.layer_matrix import matrix, samples
from pysolve.plan import Site
from pysolve.solve.least_squares import refit
from pysolve.solve.selection import select_channels

METHODS = ("elimination", "swap", "forward", "lasso", "weighted_lasso", "magnitude", "activation")


def draws(seed, n=200, d=6, h=4, noise=0.3):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    x = rng.standard_normal((n, d)) * 10 ** rng.uniform(-1, 1, d) @ turn + rng.standard_normal(d)
    return x, x @ rng.standard_normal((d, h)) + noise * rng.standard_normal((n, h)) + rng.standard_normal(h)


def centred(values):
    return values - values.mean(0)


def residual(x, y):
    """min_{M, b} E‖y − M x − b‖², from the samples."""
    x, y = centred(x), centred(y)
    return np.square(y - x @ np.linalg.lstsq(x, y, rcond=1e-10)[0]).sum() / len(y)


def kept(menu, k):
    """Channels that stay at a size."""
    return menu.at(k).keep[menu.unit]


def energy(y):
    return np.square(centred(y)).sum() / len(y)


@given(seeds)
def test_a_single_reader_of_one_site_alone_is_the_problem_of_its_centred_correlations(seed):
    x, y = draws(seed)
    problem, left = site_problem(Site(6, ("a",), ("b",)), {"b": Correlations.from_samples(x, y)}, {"b": 6})
    x, y = centred(x), centred(y) / np.sqrt(energy(y))
    np.testing.assert_allclose(problem.xx[0], x.T @ x / len(x), rtol=1e-9, atol=1e-9 * np.abs(x.T @ x).max())
    np.testing.assert_allclose(problem.yx[0], y.T @ x / len(x), rtol=1e-9, atol=1e-9 * np.abs(y.T @ x).max())
    np.testing.assert_allclose(left, [1.0])


@given(seeds, st.integers(0, 3), st.integers(1, 2))
def test_errors_of_every_size_are_those_of_a_fit_in_which_other_inputs_stay_free(seed, others, each):
    x, y = draws(seed, d=4 * each + others)
    place = np.random.default_rng(seed).permutation(x.shape[1])
    columns = place[: 4 * each].reshape(4, each)
    site = Site(4, ("a",), ("b",), columns={"b": columns})
    problem, left = site_problem(site, {"b": Correlations.from_samples(x, y)}, {"b": x.shape[1]})
    menu = site_menu(site, problem, left)
    for k in range(5):
        keep = kept(menu, k)
        used = np.concatenate([columns[keep].ravel(), place[4 * each :]])
        wanted = residual(x[:, used], y) / energy(y)
        assert menu.error[k] == pytest.approx(max(wanted, FLOOR), rel=1e-4, abs=1e-6)


@given(seeds)
def test_readers_with_different_numbers_of_inputs_add_up(seed):
    rng = np.random.default_rng(seed)
    x, y = draws(seed, d=8)
    small, z = rng.standard_normal((150, 4)), rng.standard_normal((150, 2))
    site = Site(4, ("a",), ("b", "c"))
    found = {"b": Correlations.from_samples(x, y), "c": Correlations.from_samples(small, z)}
    problem, left = site_problem(site, found, {"b": 4, "c": 4})
    assert problem.group_size == 2
    menu = site_menu(site, problem, left)
    for k in range(5):
        keep = kept(menu, k)
        shares = (
            residual(x.reshape(-1, 4, 2)[:, keep].reshape(len(x), -1), y) / energy(y),
            residual(small[:, keep], z) / energy(z),
        )
        assert menu.error[k] == pytest.approx(np.mean(shares), rel=1e-4, abs=1e-6)


def test_not_normalised_the_problem_has_the_layers_own_units():
    x, y = draws(0)
    site, found = Site(6, ("a",), ("b",)), {"b": Correlations.from_samples(x, 10 * y)}
    problem, left = site_problem(site, found, {"b": 6}, normalised=False)
    np.testing.assert_allclose(problem.yx[0], found["b"].centered().r_yx)
    assert left == pytest.approx([energy(10 * y)])


def test_columns_of_a_convolution_are_all_taps_of_the_sites_channels():
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(3, 2, 3, bias=False), torch.randn(2, 3, 5, 5)
    rows = samples(layer, x).double().numpy()
    found = Correlations.from_samples(rows, rows @ matrix(layer).double().numpy().T)
    site = Site(2, ("a",), ("b",), columns={"b": [[2], [0]]})
    columns = reader_columns(site, found, "b", 3)
    np.testing.assert_array_equal(columns, [np.arange(18, 27), np.arange(9)])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_chooses_what_select_channels_does(method):
    x, y = draws(1, d=12, noise=0.0)
    site = Site(12, ("a",), ("b",))
    problem, left = site_problem(site, {"b": Correlations.from_samples(x, y)}, {"b": 12})
    menu = site_menu(site, problem, left, method)
    assert list(kept(menu, 0)) == []
    for k in (1, 5, 12):
        np.testing.assert_array_equal(kept(menu, k), select_channels(problem, k=k, method=method))
        wanted = max(residual(x[:, kept(menu, k)], y) / energy(y), FLOOR)
        # Others than elimination are measured at a few sizes, 5 not among them.
        rtol = 1e-4 if method == "elimination" or k != 5 else 1.0
        assert menu.error[k] == pytest.approx(wanted, rel=rtol, abs=1e-6)
    assert np.all(np.diff(menu.error) <= 0)
    assert menu.error[0] == pytest.approx(1.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_site_that_nothing_depends_on_is_chosen_from_too(method):
    x, _ = draws(2)
    site = Site(6, ("a",), ("b",))
    problem, left = site_problem(site, {"b": Correlations.from_samples(x, np.ones((len(x), 3)))}, {"b": 6})
    menu = site_menu(site, problem, left, method)
    np.testing.assert_allclose(menu.error, FLOOR)
    assert len(kept(menu, 2)) == 2


def test_channels_that_never_change_go_first_however_large_they_are():
    rng = np.random.default_rng(0)
    x, _ = draws(3)
    x[:, [1, 4]] = [1234.567, -0.0123]
    x[:, 4] *= 1 + 1e-7 * rng.standard_normal(len(x))
    y = x @ rng.standard_normal((6, 3))
    site = Site(6, ("a",), ("b",))
    problem, left = site_problem(site, {"b": Correlations.from_samples(x, y)}, {"b": 6})
    menu = site_menu(site, problem, left)
    np.testing.assert_array_equal(kept(menu, 4), [0, 2, 3, 5])
    assert menu.error[4] < 1e-6


@st.composite
def fits(draw):
    """Samples with dead, repeated and rank-deficient inputs, some of the inputs, and a prior for them."""
    rng = np.random.default_rng(draw(seeds))
    d, n = draw(st.integers(1, 8)), draw(st.integers(2, 40))
    x = correlated_samples(
        rng, n, d, draw(st.integers(1, d)), draw(st.integers(0, 2)), draw(st.integers(0, d - 1)), 1.0
    )
    x += draw(st.sampled_from([0.0, 1.0])) * rng.standard_normal(d)
    y = rng.standard_normal((n, 3)) + rng.standard_normal(3)
    columns = np.sort(rng.permutation(d)[: draw(st.integers(1, d))])
    return x, y, columns, rng.standard_normal((3, len(columns)))


def constants(x):
    """Sums of squares do not show how inputs vary that vary by less than 1e-5 of their mean."""
    return x.var(0) <= 1e-10 * np.square(x).mean(0)


def pulls(x, intercept):
    """Variances, those of a hundredth of the median and below raised to it."""
    v = np.where(constants(x), 0.0, x.var(0)) if intercept else np.square(x).mean(0)
    return np.maximum(v, np.median(v[v > 0]) / 100) if v.any() else v


def objective(x, y, M, b, prior, ridge):
    fitted = x @ M.T + (0.0 if b is None else b)
    v = pulls(x, b is not None)
    return 0.5 * np.square(y - fitted).sum(1).mean() + 0.5 * ridge * np.sum(v * np.square(M - prior))


def hardly_varies(share):
    """Two inputs, the first of which varies by a share of a mean far from zero."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 2)), rng.standard_normal((12, 3))
    x[:, 0] = 1 + share * x[:, 0]
    return x, y, np.arange(2), rng.standard_normal((3, 2))


@given(fits(), st.booleans(), st.sampled_from([1e-6, 1e-4, 1e-1]))
@example(hardly_varies(7e-7), True, 1e-6)
@example(hardly_varies(2e-5), True, 1e-6)
@example(hardly_varies(7e-7), False, 1e-6)
def test_a_refit_minimises_what_it_states(fit, intercept, ridge):
    x, y, columns, prior = fit
    M, b, _ = refit(Correlations.from_samples(x, y), columns, prior, ridge=ridge, intercept=intercept)
    assert (b is not None) == intercept
    x = x[:, columns]
    still = intercept & constants(x)
    np.testing.assert_array_equal(M[:, still], prior[:, still])
    best = objective(x, y, M, b, prior, ridge)
    rng = np.random.default_rng(0)
    spread = np.sqrt(np.square(x).mean(0)).max() or 1.0
    for size in (1e-3, 1e-2, 1.0):
        other = M + ~still * size * rng.standard_normal(M.shape) / spread
        free = None if b is None else y.mean(0) - other @ x.mean(0)
        assert best <= objective(x, y, other, free, prior, ridge) * (1 + 1e-9)


@given(fits(), st.booleans())
def test_a_refit_has_no_gradient_left(fit, intercept):
    x, y, columns, prior = fit
    M, b, _ = refit(Correlations.from_samples(x, y), columns, prior, ridge=1e-3, intercept=intercept)
    x = x[:, columns]
    u, v = (centred(x), centred(y)) if intercept else (x, y)
    gradient = (u @ M.T - v).T @ u / len(x) + 1e-3 * pulls(x, intercept) * (M - prior)
    # Centring leaves rounding of the size of the mean squares.
    scale = np.square(x).mean(0).max() * (1 + np.abs(prior).max()) + np.abs(y.T @ x / len(x)).max()
    assert np.abs(gradient).max() <= 1e-8 * scale
    if intercept:
        np.testing.assert_allclose(b, y.mean(0) - M @ x.mean(0), rtol=1e-9, atol=1e-9 * scale)


@given(fits(), st.booleans())
def test_a_refit_is_never_worse_than_the_prior(fit, intercept):
    x, y, columns, prior = fit
    found = Correlations.from_samples(x, y)
    M, b, _ = refit(found, columns, prior, intercept=intercept)
    used = Correlations.from_samples(x[:, columns], y)
    before = used.error(prior, used.bias(prior) if intercept else None)
    assert used.error(M, b) <= before * (1 + 1e-9) + 1e-12


def hardly_moves():
    """An input whose outputs are a mean and next to nothing else."""
    x = 1e-3 * np.random.default_rng(0).standard_normal((20, 1))
    return x, np.zeros((20, 3)), np.arange(1), np.array([[-0.6], [-0.001], [0.4]])


@given(fits(), st.booleans())
@example(hardly_moves(), True)
def test_a_refit_returns_a_prior_that_explains_everything(fit, intercept):
    x, _, columns, prior = fit
    bias = np.array([1.0, -2.0, 0.5]) * intercept
    y = x[:, columns] @ prior.T + bias
    M, b, _ = refit(Correlations.from_samples(x, y), columns, prior, intercept=intercept)
    fitted = x[:, columns] @ M.T + (b if intercept else 0.0)
    # An output that varies by less than 1e-5 of its mean is fitted as a constant, by the bias alone.
    still = intercept & (y.var(0) <= 1e-10 * np.square(y).mean(0))
    np.testing.assert_allclose(fitted[:, still], y.mean(0)[still] * np.ones((len(y), 1)), rtol=1e-5)
    np.testing.assert_allclose(fitted[:, ~still], y[:, ~still], atol=1e-6 * (1 + np.abs(y).max()))
    np.testing.assert_allclose(M[~still], prior[~still], atol=1e-3 * np.abs(prior).max())


def test_inputs_that_never_change_keep_their_weights_and_do_not_stiffen_the_others():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 6))
    x[:, 3:] = [123.4, 0.567, -8.9e3]
    y = x @ rng.standard_normal((6, 3)) + rng.standard_normal(3)
    prior = rng.standard_normal((3, 6))
    M, b, _ = refit(Correlations.from_samples(x, y), np.arange(6), prior, ridge=1e-6)
    np.testing.assert_array_equal(M[:, 3:], prior[:, 3:])
    np.testing.assert_allclose(x @ M.T + b, y, atol=1e-4)


def test_without_a_ridge_repeated_inputs_are_no_error():
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((50, 2)), 2, axis=1)
    y = x @ rng.standard_normal((4, 3))
    M, b, _ = refit(Correlations.from_samples(x, y), np.arange(4), np.zeros((3, 4)), ridge=0.0)
    np.testing.assert_allclose(x @ M.T + b, y, atol=1e-5)
