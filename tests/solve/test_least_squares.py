import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import instances, seeds

import pysolve as ps
from pysolve.correlations import Correlations
from pysolve.solve.least_squares import refit


@given(instances(), st.data())
def test_no_other_matrix_on_the_kept_groups_does_better(case, data):
    keep = data.draw(st.lists(st.integers(0, case.groups - 1), unique=True).map(sorted))
    M = ps.debias(case.r_xx, case.r_yx, keep, group_size=case.group_size)
    columns = [g * case.group_size + i for g in keep for i in range(case.group_size)]
    others = np.setdiff1d(np.arange(len(case.r_xx)), columns)
    assert not M[:, others].any()
    scale = np.sqrt(np.diag(case.r_xx)[columns])
    gradient = (M @ case.r_xx - case.r_yx)[:, columns]
    # The ridge leaves a gradient of ε R_ii M_i; correlations with y bound everything by Cauchy–Schwarz.
    size = np.sqrt(np.diag(case.r_yy))[:, None] * scale
    assert np.all(np.abs(gradient) <= 1e-5 * size)


@given(instances(spread=0.5))
def test_debiasing_never_raises_the_error_of_a_solution(case):
    solution = ps.solve_linear_reconstruction(
        case.r_xx, case.r_yx, case.lam, group_size=case.group_size, tol=1e-6
    )
    refit = ps.debias(case.r_xx, case.r_yx, solution.keep, group_size=case.group_size)

    def error(M):
        return 0.5 * np.vdot(M @ case.r_xx, M) - np.vdot(case.r_yx, M)

    assert error(refit) <= error(solution.M) + 1e-7 * np.trace(case.r_yy)


def test_takes_correlations():
    x = np.random.default_rng(0).standard_normal((50, 6))
    correlations = ps.Correlations.from_samples(x, x[:, :2], group_size=2)
    M = ps.debias(correlations, keep=[0])
    np.testing.assert_allclose(M, np.eye(2, 6), atol=1e-8)
    np.testing.assert_array_equal(M, ps.debias(correlations.r_xx, correlations.r_yx, [0], group_size=2))


def test_several_readers_come_back_as_a_tuple_in_every_form():
    x = np.random.default_rng(0).standard_normal((50, 6))
    layers = [ps.Correlations.from_samples(x + h, x[:, :h], group_size=2) for h in (1, 2)]
    alone = [ps.debias(one, keep=[0, 2]) for one in layers]
    R, C = [one.r_xx for one in layers], [one.r_yx for one in layers]
    for M in (
        ps.debias(layers, [0, 2]),
        ps.debias(R, C, [0, 2], group_size=2),
        ps.debias((R, C), keep=[0, 2], group_size=2),
        ps.debias(list(zip(R, C, strict=True)), [0, 2], group_size=2),
    ):
        assert isinstance(M, tuple)
        for one, wanted in zip(M, alone, strict=True):
            np.testing.assert_array_equal(one, wanted)


def test_keeping_nothing_gives_zero():
    assert not ps.debias(np.eye(3), np.ones((2, 3)), []).any()


@pytest.mark.parametrize(
    ("keep", "options", "message"),
    [
        ([0, 3], {}, "keep must lie within 0 … 2, got 0 … 3"),
        ([1, 1], {}, "each once"),
        ([[0]], {}, "a list of group indices"),
        ([0], {"ridge": -1.0}, "ridge must be"),
        ([0, 1], {"ridge": 0.0}, "singular at ridge=0"),
    ],
)
def test_bad_values_are_refused(keep, options, message):
    with pytest.raises(ValueError, match=message):
        ps.debias(np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]), np.ones((1, 3)), keep, **options)


def test_keep_cannot_be_forgotten():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'keep'"):
        ps.debias(np.eye(3), np.ones((1, 3)))


@pytest.mark.parametrize(("keep", "message"), [([True, False, True], "got a mask"), ([0.5], "integers")])
def test_bad_types_are_refused(keep, message):
    with pytest.raises(TypeError, match=message):
        ps.debias(np.eye(3), np.ones((1, 3)), keep)


@given(seeds)
def test_without_any_inputs_the_mean_is_left(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((20, 3)), rng.standard_normal((20, 2)) + 1.0
    known = ps.Correlations.from_samples(x, y)
    M, bias, _ = refit(known, np.zeros(0, np.intp), np.zeros((2, 0)))
    assert M.shape == (2, 0)
    np.testing.assert_allclose(bias, y.mean(0))
    M, bias, _ = refit(known, np.zeros(0, np.intp), np.zeros((2, 0)), intercept=False)
    assert (M.shape, bias) == ((2, 0), None)


def test_inputs_that_few_samples_switch_on_nearly_keep_their_weights():
    """A fit of what happened in these two samples takes a weight of 5,000."""
    rng = np.random.default_rng(0)
    n, h = 20_000, 3
    x = np.maximum(rng.standard_normal((n, 6)), 0)
    x[:, 5] = 0
    x[:2, 5] = 1e-3
    W = rng.standard_normal((h, 6))
    y = x @ W.T + 0.1 * rng.standard_normal((n, h))
    y[:2] += 5
    M, *_ = refit(Correlations.from_samples(x, y), np.arange(6), W)
    np.testing.assert_allclose(M[:, :5], W[:, :5], atol=0.05)
    np.testing.assert_allclose(M[:, 5], W[:, 5], atol=2)


@given(seeds, st.booleans(), st.sampled_from([None, 0.0, 1.0]), st.booleans())
def test_the_share_that_is_lost_is_that_of_the_fit(seed, intercept, ridge, constant):
    rng = np.random.default_rng(seed)
    x, W = rng.standard_normal((40, 6)) + rng.integers(-2, 3, 6), rng.standard_normal((3, 6))
    x[:, 2] = 3.0 if constant else x[:, 1]
    y = x @ W.T + 0.3 * rng.standard_normal((40, 3)) + 1.0
    known, columns = Correlations.from_samples(x, y), np.array([0, 1, 2, 4])
    M, bias, lost = refit(known, columns, W[:, columns], ridge=ridge, intercept=intercept)
    assert lost == pytest.approx(known.restrict(columns).share_lost(M, bias), rel=1e-6, abs=1e-9)
