import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import hostile_instances, instances, seeds

import pysolve as ps
from pysolve import _core


def core_problem(case, readers, weights):
    """A problem as the core sees it, of unit size, its outputs dealt to several readers."""
    R = case.r_xx / max(np.diag(case.r_xx).max(), 1e-300)
    C = case.r_yx / max(np.abs(case.r_yx).max(), 1e-300)
    outputs = [len(part) for part in np.array_split(C, readers)]
    return _core.Problem(
        xx=[R] * readers,
        outputs=outputs,
        yx=np.ascontiguousarray(C.T),
        group_size=case.group_size,
        weights=weights,
    )


@given(instances(spread=0.5), seeds, st.integers(1, 3))
def test_gradient_and_hessian_are_the_derivatives_of_phi(case, seed, readers):
    """∂φ/∂log η_g = ½ lam w_g η_g (1 − p_g²), and the Hessian its derivative, by central differences."""
    rng = np.random.default_rng(seed)
    weights, eta, lam, step = (
        rng.uniform(0.5, 2, case.groups),
        rng.uniform(0.5, 2, case.groups),
        case.share,
        1e-5,
    )
    problem = core_problem(case, readers, weights)

    def gradient(eta):
        return 0.5 * lam * weights * (1 - _core.variational(problem, lam, eta)[1] ** 2)

    phi, _, upper = _core.variational(problem, lam, eta)
    hessian, size = np.triu(upper) + np.triu(upper, 1).T, abs(phi) + lam * weights.sum()
    for g, e in enumerate(step * np.diag(eta)):
        up, down = (_core.variational(problem, lam, eta + s * e)[0] for s in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(eta[g] * gradient(eta)[g], abs=1e-6 * size)
        row = eta * (gradient(eta + e) - gradient(eta - e)) / (2 * step)
        np.testing.assert_allclose(row, hessian[g], atol=1e-6 * size)


@given(hostile_instances())
def test_hostile_problems_end_certified_or_with_an_honest_gap(case):
    solution = ps.newton((case.r_xx, case.r_yx), case.lam, group_size=case.group_size, tol=1e-6)
    assert np.all(np.isfinite(solution.M))
    assert np.isfinite(solution.objective)
    assert not np.isnan(solution.gap)
    assert solution.status in ("converged", "precision", "max_iter")
    certificate = ps.certify(case.r_xx, case.r_yx, solution.M, case.lam, group_size=case.group_size)
    size = 1e-9 * np.trace(case.r_yy)
    assert certificate.objective == pytest.approx(solution.objective, rel=1e-6, abs=size)
    # The certificate's own bound can be loose here; what must hold is that nothing lies below ours.
    rest = ps.newton((case.r_xx, case.r_yx), case.lam, group_size=case.group_size, tol=0.0, max_iter=50)
    assert min(rest.objective, certificate.objective) >= solution.objective - solution.gap - size


@given(instances(), st.floats(0.02, 0.5))
def test_a_warm_start_from_a_neighbouring_lam_ends_at_the_same_objective(case, share):
    cold = ps.newton((case.r_xx, case.r_yx), case.lam, group_size=case.group_size)
    other = ps.newton((case.r_xx, case.r_yx), share * case.lam_max, group_size=case.group_size)
    warm = ps.newton((case.r_xx, case.r_yx), case.lam, group_size=case.group_size, M0=other.M)
    slack = 1e-10 * np.trace(case.r_yy)
    assert warm.objective == pytest.approx(cold.objective, abs=warm.gap + cold.gap + slack)


@given(instances(spread=0.5))
def test_two_identical_readers_equal_one_with_its_penalty_over_root_two(case):
    """Σ of two equal smooth parts is 2 f(M), and the joint norm of two equal blocks √2 ‖M_g‖."""
    pair = (case.r_xx, case.r_yx)
    joint = ps.newton([pair, pair], case.lam, group_size=case.group_size, tol=1e-10)
    single = ps.newton(pair, case.lam / np.sqrt(2), group_size=case.group_size, tol=1e-10)
    slack = 1e-9 * np.trace(case.r_yy)
    assert joint.objective == pytest.approx(2 * single.objective, abs=slack)
    for M in joint.M:
        certificate = ps.certify(*pair, M, case.lam / np.sqrt(2), group_size=case.group_size)
        assert certificate.gap <= 1e-6 * abs(certificate.objective) + slack


def test_few_rounds_reach_the_limit_of_float64():
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((2000, 20)) @ rng.standard_normal((20, 120)), 0)
    correlations = ps.Correlations.from_samples(x, x @ rng.standard_normal((120, 30))).centered()
    lam = 0.05 * ps.lam_max(correlations.r_xx, correlations.r_yx)
    solution = ps.newton(correlations, lam, tol=1e-13)
    assert solution.converged
    assert solution.iterations <= 10


@given(instances())
def test_rounds_do_not_cycle(case):
    """Each round lowers φ: groups that enter and leave again would repeat until max_iter."""
    solution = ps.newton((case.r_xx, case.r_yx), case.lam, group_size=case.group_size, tol=1e-8)
    assert solution.status in ("converged", "precision")
    assert solution.iterations <= 30


@given(instances(max_groups=50, max_group_size=3, shares=st.floats(1e-4, 0.9)))
def test_many_groups_with_few_samples_converge(case):
    """Tens of groups, rank deficient: near singular Hessians, scales that vanish, groups that all leave."""
    solution = ps.newton((case.r_xx, case.r_yx), case.lam, group_size=case.group_size, tol=1e-7)
    assert solution.status in ("converged", "precision")
    certificate = ps.certify(case.r_xx, case.r_yx, solution.M, case.lam, group_size=case.group_size)
    assert certificate.gap <= 2e-7 * abs(certificate.objective) + 1e-9 * np.trace(case.r_yy)
