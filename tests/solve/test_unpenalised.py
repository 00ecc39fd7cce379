"""Groups without a penalty, also nearly singular ones: claims hold for the problem that was given."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import exact_objective, lowest_found
from strategies import nearly_singular

import pysolve as ps

FAST = ("fista", "alternate_minimization", "newton")


def terms(case, M, lam, weights):
    """Size of what the objective sums."""
    size = np.abs(M)
    norms = np.sqrt(np.square(M).sum(0).reshape(-1, case.group_size).sum(1))
    return np.vdot(size @ np.abs(case.r_xx), size) + np.vdot(np.abs(case.r_yx), size) + lam * weights @ norms


@pytest.mark.parametrize("method", FAST)
@given(problem=nearly_singular())
def test_no_independent_fit_is_lower_than_the_gap_allows(method, problem):
    case, weights = problem
    how = {"group_size": case.group_size, "weights": weights}
    lam = case.share * (ps.lam_max(case.r_xx, case.r_yx, **how) or 1.0)
    solution = ps.solve_linear_reconstruction(case.r_xx, case.r_yx, lam, method, max_iter=2000, **how)
    value = exact_objective(case.r_xx, case.r_yx, solution.M, lam, **how)
    below = value - lowest_found(case.r_xx, case.r_yx, solution.M, lam, **how, shift=solution.shift)
    noise = 1e-9 * abs(value) + 1e-12 * np.trace(case.r_yy)
    certificate = ps.certify(case.r_xx, case.r_yx, solution.M, lam, **how)
    # Rounding may leave R indefinite and P without a minimum: then the gap is larger than P.
    assert below <= solution.gap * (1 + 1e-9) + noise or solution.relative_gap > 1
    assert below <= certificate.gap * (1 + 1e-9) + noise or certificate.relative_gap > 1
    assert solution.objective == pytest.approx(value, abs=1e-12 * terms(case, solution.M, lam, weights))
    assert solution.converged == (solution.relative_gap <= 1e-8)
    assert solution.kkt == pytest.approx(certificate.kkt)


@given(problem=nearly_singular(), offset=st.floats(1e-3, 1.0), seed=st.integers(0, 99))
def test_any_matrix_is_certified_for_the_problem_itself(problem, offset, seed):
    case, weights = problem
    how = {"group_size": case.group_size, "weights": weights}
    lam = case.share * (ps.lam_max(case.r_xx, case.r_yx, **how) or 1.0)
    M = ps.newton((case.r_xx, case.r_yx), lam, **how).M
    M = M * (1 + offset * np.random.default_rng(seed).standard_normal(M.shape))
    value = exact_objective(case.r_xx, case.r_yx, M, lam, **how)
    certificate = ps.certify(case.r_xx, case.r_yx, M, lam, **how)
    below = value - lowest_found(case.r_xx, case.r_yx, M, lam, **how, shift=certificate.shift)
    slack = 1e-12 * terms(case, M, lam, weights)
    assert below <= certificate.gap * (1 + 1e-6) + slack or certificate.relative_gap > 1


@pytest.mark.parametrize("method", FAST)
@given(problem=nearly_singular(), split=st.booleans())
def test_penalised_groups_are_zero_from_lam_max_on_and_not_below(method, problem, split):
    case, weights = problem
    given = (case.r_xx, case.r_yx)
    if split and len(case.r_yx) > 1:
        given = [(case.r_xx, case.r_yx[:1]), (case.r_xx, case.r_yx[1:])]
    how = {"group_size": case.group_size, "weights": weights}
    highest = ps.lam_max(given, **how)
    solve = getattr(ps, method)
    if highest:
        at, below = (solve(given, lam, **how, max_iter=500) for lam in (highest, 0.9 * highest))
        assert not weights[at.keep].any()
        assert weights[below.keep].any()
    # Its rounding is that of the fit of the unpenalised groups.
    beyond = solve(given, 1.01 * highest + 1e-6 * case.lam_max, **how)
    assert not weights[beyond.keep].any()


@given(problem=nearly_singular())
def test_several_readers_are_certified_as_one_would_be(problem):
    case, weights = problem
    if len(case.r_yx) < 2:
        return
    how = {"group_size": case.group_size, "weights": weights}
    lam = case.share * (ps.lam_max(case.r_xx, case.r_yx, **how) or 1.0)
    split = [(case.r_xx, case.r_yx[:1]), (case.r_xx, case.r_yx[1:])]
    joint, single = ps.newton(split, lam, **how), ps.newton((case.r_xx, case.r_yx), lam, **how)
    values = [exact_objective(case.r_xx, case.r_yx, M, lam, **how) for M in (np.vstack(joint.M), single.M)]
    noise = 1e-9 * abs(values[0]) + 1e-12 * np.trace(case.r_yy)
    assert values[0] - values[1] <= joint.gap + noise or joint.relative_gap > 1
    assert values[1] - values[0] <= single.gap + noise or single.relative_gap > 1


@given(problem=nearly_singular())
def test_every_solution_of_a_path_is_certified(problem):
    case, weights = problem
    how = {"group_size": case.group_size, "weights": weights}
    highest = ps.lam_max(case.r_xx, case.r_yx, **how)
    if not highest:
        return
    for one in ps.regularization_path(case.r_xx, case.r_yx, n_lams=4, ratio=1e-2, **how):
        value = exact_objective(case.r_xx, case.r_yx, one.M, one.lam, **how)
        below = value - lowest_found(case.r_xx, case.r_yx, one.M, one.lam, **how, shift=one.shift)
        slack = 1e-9 * abs(value) + 1e-12 * np.trace(case.r_yy)
        assert below <= one.gap * (1 + 1e-9) + slack or one.relative_gap > 1


def test_a_bias_input_far_from_zero_costs_no_precision():
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((200, 300)) + 1, 0)
    x[:, 0] = 1.0
    y = x @ rng.standard_normal((300, 4)) + 3.0
    R, C, weights = x.T @ x / 200, y.T @ x / 200, np.arange(300) > 0
    highest = ps.lam_max(R, C, weights=weights)
    for share in (0.3, 1e-2, 1e-4):
        assert ps.newton((R, C), share * highest, weights=weights).converged
