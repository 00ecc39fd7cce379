import itertools
import os
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import published_problem
from strategies import instances

import pysolve as ps

METHODS = ("proximal_gradient", "fista", "alternate_minimization", "newton")
FAST = ("fista", "alternate_minimization", "newton")


def solve(case, method, tol=1e-6, **options):
    return ps.solve_linear_reconstruction(
        case.r_xx,
        case.r_yx,
        options.pop("lam", case.lam),
        method,
        group_size=case.group_size,
        tol=tol,
        **options,
    )


def certify(case, M, lam=None, weights=None):
    return ps.certify(
        case.r_xx, case.r_yx, M, case.lam if lam is None else lam, group_size=case.group_size, weights=weights
    )


def permuted(case, order):
    columns = (np.asarray(order)[:, None] * case.group_size + np.arange(case.group_size)).ravel()
    return case.r_xx[np.ix_(columns, columns)], case.r_yx[:, columns], columns


@pytest.mark.parametrize("method", FAST)
@given(case=instances())
def test_the_gap_asked_for_is_reached_as_judged_independently(method, case):
    solution = solve(case, method)
    assert solution.status in ("converged", "precision")
    certificate = certify(case, solution.M)
    noise = 1e-10 * np.trace(case.r_yy)
    assert certificate.gap <= 1e-6 * abs(certificate.objective) + noise
    assert solution.gap == pytest.approx(certificate.gap, rel=0.5, abs=noise)
    assert solution.objective == pytest.approx(certificate.objective, rel=1e-9, abs=noise)


@pytest.mark.parametrize("method", METHODS)
@given(case=instances(spread=0.5, shares=st.sampled_from([1e-8, 1e-6, 1e-4, 1e-2])), weighted=st.booleans())
def test_where_the_energy_is_known_precision_is_relative_to_the_whole_objective(method, case, weighted):
    """½ E‖y‖² takes all but a sliver away from P where the fit is nearly perfect."""
    weights = np.arange(case.groups) + 0.5 - 0.5 * weighted
    solution = solve(case, method, r_yy=case.r_yy, weights=weights, max_iter=2000)
    certificate = certify(case, solution.M, weights=weights)
    energy = 0.5 * np.trace(case.r_yy)
    whole = certificate.objective + energy
    assert solution.objective == pytest.approx(whole, abs=1e-9 * energy)
    if solution.converged:
        assert solution.gap <= 1e-6 * abs(solution.objective)
        assert certificate.gap <= 2e-6 * abs(whole) + 1e-12 * energy


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [1e-3, 1e-5, 1e-7])
def test_converged_means_that_the_support_is_right_even_where_lam_is_tiny(method, share):
    rng = np.random.default_rng(1)
    x, truth = rng.standard_normal((64, 128)), np.zeros((2, 128))
    truth[:, rng.choice(128, 5, replace=False)] = rng.standard_normal((2, 5))
    y = x @ truth.T
    R, C, yy = x.T @ x / 64, y.T @ x / 64, np.square(y).sum() / 64
    lam = share * ps.lam_max(R, C)
    solution = ps.solve_linear_reconstruction(R, C, lam, method, r_yy=yy, max_iter=5000)
    if solution.converged:
        np.testing.assert_array_equal(solution.keep, np.flatnonzero(truth.any(0)))
        assert np.abs(solution.M - truth).max() <= 10 * lam
    else:
        assert method != "newton" or solution.status == "precision"


@given(case=instances(spread=0.5, shares=st.floats(0.1, 0.9)))
def test_proximal_gradient_ends_certified_or_says_how_far_it_got(case):
    solution = solve(case, "proximal_gradient", tol=1e-4, max_iter=3000)
    certificate = certify(case, solution.M)
    assert solution.gap == pytest.approx(certificate.gap, rel=0.5, abs=1e-10 * np.trace(case.r_yy))
    assert solution.converged == (solution.relative_gap <= 1e-4)


@given(case=instances())
def test_two_solvers_differ_by_at_most_their_gaps(case):
    solutions = [solve(case, method, tol=1e-5) for method in FAST]
    slack = 1e-12 * np.trace(case.r_yy)
    for first, second in itertools.combinations(solutions, 2):
        assert abs(first.objective - second.objective) <= max(first.gap, second.gap) + slack


@pytest.mark.parametrize("method", METHODS)
@given(case=instances())
def test_zero_from_lam_max_on_and_not_below(method, case):
    above = solve(case, method, lam=case.lam_max)
    assert above.keep.size == 0
    assert not above.M.any()
    below = solve(case, method, lam=0.9 * case.lam_max, max_iter=200)
    assert below.keep.size > 0


@pytest.mark.parametrize("method", FAST)
@given(case=instances(spread=0.5), data=st.data())
def test_permuting_groups_permutes_the_solution(method, case, data):
    order = data.draw(st.permutations(range(case.groups)))
    r_xx, r_yx, columns = permuted(case, order)
    plain = solve(case, method, tol=1e-10)
    moved = ps.solve_linear_reconstruction(
        r_xx, r_yx, case.lam, method, group_size=case.group_size, tol=1e-10
    )
    # Solutions need not be unique (repeated channels), but what they predict, M R, is.
    predicted, again = (plain.M @ case.r_xx)[:, columns], moved.M @ r_xx
    np.testing.assert_allclose(again, predicted, atol=1e-3 * np.abs(case.r_yx).max())
    slack = 1e-12 * np.trace(case.r_yy)
    assert moved.objective == pytest.approx(plain.objective, abs=plain.gap + moved.gap + slack)


@pytest.mark.parametrize("method", FAST)
@given(case=instances(spread=0.5), x_scale=st.floats(1e-3, 1e3), y_scale=st.floats(1e-3, 1e3))
def test_scaling_the_data_scales_the_answer(method, case, x_scale, y_scale):
    """x → a x, y → b y, lam → a b lam: M → (b/a) M and P → b² P."""
    a, b = x_scale, y_scale
    plain = solve(case, method, tol=1e-9)
    scaled = ps.solve_linear_reconstruction(
        a * a * case.r_xx, a * b * case.r_yx, a * b * case.lam, method, group_size=case.group_size, tol=1e-9
    )
    assert scaled.objective == pytest.approx(
        b * b * plain.objective, rel=1e-7, abs=1e-12 * b * b * case.lam_max
    )
    certificate = certify(case, scaled.M * a / b)
    assert certificate.gap <= 1e-8 * abs(certificate.objective) + 1e-10 * np.trace(case.r_yy)


@pytest.mark.parametrize("method", METHODS)
@given(case=instances())
def test_restart_at_the_solution_stays(method, case):
    solution = solve(case, "fista", tol=1e-8)
    again = solve(case, method, tol=1e-7, M0=solution.M)
    assert again.iterations <= 1
    # Directions along which R is zero and the scaling of channels may cost the last digits.
    np.testing.assert_allclose(
        again.M @ case.r_xx, solution.M @ case.r_xx, atol=1e-6 * np.abs(case.r_yx).max()
    )


@pytest.mark.parametrize("method", FAST)
@given(case=instances(spread=0.5, max_group_size=3), data=st.data())
def test_an_unpenalised_group_is_solved_exactly(method, case, data):
    weights = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=case.groups,
                                          max_size=case.groups)))  # fmt: skip
    solution = solve(case, method, weights=weights)
    certificate = certify(case, solution.M, weights=weights)
    noise = 1e-9 * np.trace(case.r_yy)
    assert certificate.gap <= 1e-6 * abs(certificate.objective) + noise


@pytest.mark.parametrize("method", FAST)
@given(seed=st.integers(0, 99))
def test_an_unpenalised_constant_input_equals_centring(method, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((60, 5)) + rng.standard_normal(5)
    y = np.maximum(x @ rng.standard_normal((5, 3)), 0) + 1.0
    centred = ps.Correlations.from_samples(x, y)
    constant = ps.Correlations.from_samples(np.hstack([x, np.ones((60, 1))]), y)
    lam = 0.2 * ps.lam_max(centred.centered().r_xx, centred.centered().r_yx)
    one = ps.fista(centred.centered(), lam, tol=1e-12)
    two = ps.solve_linear_reconstruction(
        constant.r_xx, constant.r_yx, lam, method, weights=[1, 1, 1, 1, 1, 0], tol=1e-12
    )
    np.testing.assert_allclose(two.M[:, :-1], one.M, atol=1e-5)
    np.testing.assert_allclose(two.M[:, -1], centred.bias(one.M), atol=1e-5)


@pytest.mark.parametrize("method", FAST)
@given(case=instances(spread=0.5, max_group_size=4))
def test_several_readers_share_their_groups(method, case):
    """Splitting the outputs of one problem among readers changes nothing: the norm runs over all of them."""
    if len(case.r_yx) < 2:
        return
    split = [(case.r_xx, case.r_yx[:1]), (case.r_xx, case.r_yx[1:])]
    joint = getattr(ps, method)(split, case.lam, group_size=case.group_size, tol=1e-8)
    single = solve(case, method, tol=1e-8)
    slack = 1e-12 * np.trace(case.r_yy)
    assert joint.objective == pytest.approx(single.objective, abs=joint.gap + single.gap + slack)
    certificate = certify(case, np.vstack(joint.M))
    assert certificate.gap <= 1e-6 * abs(certificate.objective) + 1e-10 * np.trace(case.r_yy)


@pytest.mark.parametrize("method", FAST)
def test_readers_with_different_correlations_are_certified_jointly(method):
    rng = np.random.default_rng(3)
    xs = [rng.standard_normal((40, 6)) * rng.uniform(0.1, 3, 6) for _ in range(3)]
    pairs = [
        (x.T @ x / 40, rng.standard_normal((h, 6)) @ x.T @ x / 40) for x, h in zip(xs, (1, 9, 3), strict=True)
    ]
    solution = getattr(ps, method)(pairs, 2.0, group_size=2, tol=1e-9)
    certificate = ps.certify(
        [r for r, _ in pairs], [c for _, c in pairs], list(solution.M), 2.0, group_size=2
    )
    assert certificate.relative_gap <= 1.1e-9
    zero = [[not m[:, 2 * g : 2 * g + 2].any() for m in solution.M] for g in range(3)]
    assert all(len(set(rows)) == 1 for rows in zero)


@pytest.mark.parametrize("method", METHODS)
def test_uncorrelated_inputs_have_a_closed_form(method):
    """R = diag(r): M_j = (1 − lam/‖C_j‖)₊ C_j / r_j."""
    rng = np.random.default_rng(0)
    r, C = rng.uniform(0.5, 2, 8), rng.standard_normal((3, 8))
    norms = np.linalg.norm(C, axis=0)
    lam = float(np.median(norms))
    solution = ps.solve_linear_reconstruction(np.diag(r), C, lam, method, tol=1e-12)
    np.testing.assert_allclose(solution.M, np.maximum(1 - lam / norms, 0) * C / r, atol=1e-6)
    np.testing.assert_array_equal(solution.keep, np.flatnonzero(norms > lam))


@pytest.mark.parametrize("method", FAST)
def test_the_published_toy_problem(method):
    """All inputs stay at lam = 0.1, so M = C R⁺ up to the shrinkage that the optimality condition states."""
    R, C = published_problem(100, 200, 80, 10000)
    solution = ps.solve_linear_reconstruction(R, C, 0.1, method, tol=1e-11)
    assert ps.certify(R, C, solution.M, 0.1).relative_gap <= 1e-11
    norms = np.linalg.norm(solution.M, axis=0)
    assert norms.min() > 0
    np.testing.assert_allclose(solution.M @ (R + np.diag(0.1 / norms)), C, atol=1e-5)
    zero = ps.solve_linear_reconstruction(R, C, ps.lam_max(R, C), method)
    assert not zero.M.any()


@pytest.mark.parametrize("method", FAST)
def test_agrees_with_an_independent_solver(method):
    """scikit-learn's MultiTaskLasso minimises ½/n ‖Y − X W‖² + α Σ_j ‖W_j‖ on the samples themselves."""
    # Not above: all processes would wait for it.
    from sklearn.linear_model import MultiTaskLasso

    rng = np.random.default_rng(1)
    x = rng.standard_normal((200, 12)) @ rng.standard_normal((12, 12))
    y = x @ rng.standard_normal((12, 4)) + rng.standard_normal((200, 4))
    correlations = ps.Correlations.from_samples(x, y)
    lam = 0.3 * ps.lam_max(correlations.r_xx, correlations.r_yx)
    oracle = MultiTaskLasso(alpha=lam, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x, y)
    solution = getattr(ps, method)(correlations, lam, tol=1e-11)
    np.testing.assert_allclose(solution.M, oracle.coef_, atol=1e-4)
    np.testing.assert_array_equal(solution.keep, np.flatnonzero(np.linalg.norm(oracle.coef_, axis=0)))


@given(case=instances(spread=0.5))
def test_r_yy_makes_the_objective_the_penalised_error(case):
    solution = solve(case, "fista", r_yy=case.r_yy)
    M, R, C = solution.M, case.r_xx, case.r_yx
    error = 0.5 * (np.trace(case.r_yy) - 2 * np.vdot(C, M) + np.vdot(M @ R, M))
    penalty = solution.objective - error
    assert penalty >= -1e-9 * np.trace(case.r_yy)
    for energy in (np.diag(case.r_yy), np.trace(case.r_yy)):
        assert solve(case, "fista", r_yy=energy).objective == pytest.approx(solution.objective)


@pytest.mark.parametrize("method", METHODS)
def test_history_callback_and_iterations_agree(method):
    R, C = published_problem(30, 20, 25, 500)
    seen = []
    solution = ps.solve_linear_reconstruction(
        R, C, 1.0, method, callback=lambda *progress: seen.append(progress), r_yy=1.0
    )
    assert [row[0] for row in seen] == list(range(solution.iterations + 1))
    np.testing.assert_array_equal([row[1] for row in seen], solution.history.objective)
    np.testing.assert_array_equal([row[2] for row in seen], solution.history.gap)
    assert np.all(np.diff(solution.history.seconds) >= 0)
    assert solution.history.gap[-1] == solution.gap
    assert solution.history.objective[-1] == solution.objective


@pytest.mark.parametrize("method", METHODS)
def test_too_few_iterations_are_no_error(method):
    R, C = published_problem(30, 20, 25, 500)
    solution = ps.solve_linear_reconstruction(R, C, 1.0, method, max_iter=1, tol=1e-12)
    assert (solution.status, solution.iterations, solution.converged) == ("max_iter", 1, False)
    assert solution.relative_gap > 1e-12
    assert "max_iter" in repr(solution)


@pytest.mark.parametrize("method", FAST)
def test_precision_beyond_float64_is_said(method):
    R, C = published_problem(30, 20, 25, 500)
    solution = ps.solve_linear_reconstruction(R, C, 1.0, method, tol=0.0)
    assert solution.status == "precision"
    assert solution.relative_gap < 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_the_callback_ends_the_solve(method):
    def fail(iteration, objective, gap):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        ps.solve_linear_reconstruction(np.eye(3), np.ones((1, 3)), 0.1, method, callback=fail)


@pytest.mark.usefixtures("interruptible")
def test_control_c_ends_the_solve():
    R, C = published_problem(200, 50, 200, 1000)
    killer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    killer.start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        ps.proximal_gradient((R, C), 1e-7, tol=0.0, max_iter=10**9)
    assert time.perf_counter() - start < 30


def test_momentum_and_restart_are_options():
    R, C = published_problem(50, 20, 40, 500)
    published = ps.fista((R, C), 0.1, restart=False, q=50, tol=1e-8)
    restarted = ps.fista((R, C), 0.1, tol=1e-8)
    assert published.converged
    assert restarted.iterations < published.iterations
    with pytest.raises(ValueError, match="q must be finite and greater than -2"):
        ps.fista((R, C), 0.1, q=-2.0)
    with pytest.raises(ValueError, match="rounds must be an integer within 1"):
        ps.alternate_minimization((R, C), 0.1, rounds=0)
    with pytest.raises(ValueError, match="epsilon must be positive and finite"):
        ps.alternate_minimization((R, C), 0.1, epsilon=np.inf)
    with pytest.raises(TypeError, match="restart must be True or False"):
        ps.fista((R, C), 0.1, restart="no")


def test_correlations_carry_their_groups():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 6))
    correlations = ps.Correlations.from_samples(x, x @ rng.standard_normal((6, 2)), group_size=3)
    solution = ps.fista(correlations, 0.5)
    plain = ps.fista((correlations.r_xx, correlations.r_yx), 0.5, group_size=3)
    np.testing.assert_array_equal(solution.M, plain.M)
