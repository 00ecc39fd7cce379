"""Where a solve starts is no more than a hint: starts from other scales neither stay nor spoil a number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import objective
from strategies import hostile_instances, instances, seeds

import pysolve as ps

METHODS = ("proximal_gradient", "fista", "alternate_minimization", "newton")
EXPONENTS = st.sampled_from([-320, -300, -160, -100, -30, -8, 0, 8, 30, 100, 160, 300])


def terms(case, M, weights):
    """Size of what the objective sums."""
    size, norms = np.abs(M), np.linalg.norm(M.reshape(len(M), -1, case.group_size), axis=(0, 2))
    return (
        np.vdot(size @ np.abs(case.r_xx), size)
        + np.vdot(np.abs(case.r_yx), size)
        + case.lam * weights @ norms
    )


def start(case, seed, exponent):
    """A random start, its groups at up to three scales."""
    rng = np.random.default_rng(seed)
    exponents = rng.choice([exponent, exponent // 2, 0, -exponent // 2], case.groups)
    scales = np.where(exponents > -330, 10.0 ** np.maximum(exponents, -323.0), 0.0)
    return rng.standard_normal(case.r_yx.shape) * np.repeat(scales, case.group_size)


@pytest.mark.parametrize("method", METHODS)
@given(case=instances() | hostile_instances(), seed=seeds, exponent=EXPONENTS, free=st.booleans())
def test_what_is_said_of_the_answer_is_true_of_it(method, case, seed, exponent, free):
    weights = np.where(np.arange(case.groups) == 0, 1.0 - free, 1.0)
    for max_iter in (0, 3):
        found = ps.solve_linear_reconstruction(
            case.r_xx,
            case.r_yx,
            case.lam,
            method,
            group_size=case.group_size,
            weights=weights,
            M0=start(case, seed, exponent),
            max_iter=max_iter,
        )
        assert np.isfinite(found.M).all()
        assert np.isfinite([found.objective, found.kkt]).all()
        assert found.gap >= 0
        kept = np.flatnonzero(found.M.any(0).reshape(-1, case.group_size).any(1))
        np.testing.assert_array_equal(found.keep, kept)
        value = objective(case.r_xx, case.r_yx, found.M, case.lam, case.group_size, weights)
        assert found.objective == pytest.approx(value, abs=1e-9 * terms(case, found.M, weights))
        assert max_iter > 0 or value <= 1e-9 * terms(case, found.M, weights)


@pytest.mark.parametrize("method", METHODS)
@given(case=instances(spread=0.5, shares=st.floats(0.1, 0.9)), seed=seeds, exponent=EXPONENTS)
def test_the_way_ends_where_it_does_without_a_start(method, case, seed, exponent):
    def solve(**options):
        return ps.solve_linear_reconstruction(
            case.r_xx,
            case.r_yx,
            case.lam,
            method,
            group_size=case.group_size,
            tol=1e-5,
            max_iter=3000,
            **options,
        )

    cold, warm = solve(), solve(M0=start(case, seed, exponent))
    slack = 1e-12 * np.trace(case.r_yy)
    assert warm.objective <= cold.objective + warm.gap + cold.gap + slack
    if method != "proximal_gradient":
        assert warm.relative_gap <= max(1e-5, 2 * cold.relative_gap) or warm.gap <= 1e-10 * np.trace(
            case.r_yy
        )


def test_a_start_that_is_better_than_zero_is_kept():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 6))
    R, C = x.T @ x / 50, (x @ rng.standard_normal((6, 3))).T @ x / 50
    lam = 0.2 * ps.lam_max(R, C)
    M0 = 0.5 * ps.newton((R, C), lam).M
    np.testing.assert_allclose(ps.newton((R, C), lam, M0=M0, max_iter=0).M, M0, rtol=1e-12)
    assert not ps.newton((R, C), lam, M0=-M0, max_iter=0).M.any()
