import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reference import objective, proximal_gradient
from strategies import instances, seeds

import pysolve as ps
from pysolve.solve.certificate import _largest_step


@given(instances(spread=0.5), seeds, st.floats(0, 2))
def test_the_gap_bounds_how_far_any_matrix_is_from_the_best_found(case, seed, size):
    """P(M) − gap(M) is a lower bound on the minimum, so it lies below P of every other matrix."""
    best = proximal_gradient(case.r_xx, case.r_yx, case.lam, case.group_size, iterations=300)
    rng = np.random.default_rng(seed)
    M = best + size * np.abs(best).max() * rng.standard_normal(best.shape)
    certificate = ps.certify(case.r_xx, case.r_yx, M, case.lam, group_size=case.group_size)
    lowest = objective(case.r_xx, case.r_yx, best, case.lam, case.group_size)
    slack = 1e-9 * (abs(lowest) + abs(certificate.objective) + np.trace(case.r_yy))
    assert certificate.objective == pytest.approx(
        objective(case.r_xx, case.r_yx, M, case.lam, case.group_size), abs=slack
    )
    assert certificate.gap >= 0
    assert certificate.objective - certificate.gap <= lowest + slack


@given(instances())
def test_zero_is_certified_at_lam_max_and_refused_below(case):
    lam_max = ps.lam_max(case.r_xx, case.r_yx, group_size=case.group_size)
    assert lam_max == pytest.approx(case.lam_max, rel=1e-12)
    zero = np.zeros_like(case.r_yx)
    at = ps.certify(case.r_xx, case.r_yx, zero, lam_max * (1 + 1e-9), group_size=case.group_size)
    assert (at.gap, at.kkt) == (0.0, 0.0)
    below = ps.certify(case.r_xx, case.r_yx, zero, lam_max * 0.9, group_size=case.group_size)
    assert below.kkt == pytest.approx(0.1 * lam_max)
    assert below.gap > 0


def test_one_input_has_a_closed_form():
    """½ r m² − c m + lam |m| has the minimiser (|c| − lam)₊ sign(c) / r."""
    certificate = ps.certify([[2.0]], [[3.0]], [[1.0]], lam=1.0)
    assert certificate.objective == pytest.approx(-1.0)
    assert certificate.gap == pytest.approx(0.0, abs=1e-15)
    assert certificate.kkt == pytest.approx(0.0, abs=1e-15)


@given(instances(spread=0.5, max_group_size=3))
def test_an_unpenalised_group_is_minimised_out(case):
    """With weight 0 on a group, its least squares fit is certified optimal from lam_max on."""
    weights = np.ones(case.groups)
    weights[0] = 0.0
    lam_max = ps.lam_max(case.r_xx, case.r_yx, group_size=case.group_size, weights=weights)
    u = slice(0, case.group_size)
    M = np.zeros_like(case.r_yx)
    M[:, u] = case.r_yx[:, u] @ np.linalg.pinv(case.r_xx[u, u], rcond=1e-12)
    certificate = ps.certify(
        case.r_xx,
        case.r_yx,
        M,
        lam_max * 1.001 + 1e-12 * case.lam_max,
        group_size=case.group_size,
        weights=weights,
    )
    assert certificate.gap <= 1e-9 * np.trace(case.r_yy)


def test_an_unreachable_target_has_an_infinite_gap():
    """C outside the range of R by more than lam: the problem has no minimum."""
    R = np.array([[1.0, 1.0], [1.0, 1.0]])
    certificate = ps.certify(R, [[1.0, -1.0]], [[0.0, 0.0]], lam=0.5)
    assert certificate.gap == np.inf


def test_several_readers_are_certified_together():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 4))
    R = x.T @ x / 50
    C = rng.standard_normal((3, 4)) @ R
    M = rng.standard_normal((3, 4))
    joint = ps.certify([R, R], [C[:1], C[1:]], [M[:1], M[1:]], lam=0.1)
    single = ps.certify(R, C, M, lam=0.1)
    assert joint.objective == pytest.approx(single.objective)
    assert joint.gap == pytest.approx(single.gap)
    assert joint.kkt == pytest.approx(single.kkt)


def test_refuses_a_matrix_of_another_shape():
    with pytest.raises(ValueError, match=r"M has shape .*\(1, 3\).* needs .*\(1, 2\)"):
        ps.certify(np.eye(2), np.ones((1, 2)), np.ones((1, 3)), 1.0)


@example(1436, 1.0, 1.0, 3)  # E on the border, and G beyond the other side of it
@given(seeds, st.sampled_from([0.0, 1e-16, 1e-8, 1.0]), st.floats(0.5, 2), st.integers(1, 4))
def test_the_step_towards_a_feasible_point_is_feasible(seed, apart, share, n):
    """‖s G + (1 − s) E‖ ≤ threshold, G as near to E as rounding allows, E on the border or inside."""
    rng = np.random.default_rng(seed)
    E, direction = rng.standard_normal((2, n))
    G = E + apart * direction
    gg, ge, ee = float(G @ G), float(G @ E), float(E @ E)
    threshold = max(share, 1.0) * np.sqrt(ee) if share < 1.5 else np.sqrt(0.5 * (gg + ee))
    s = _largest_step(gg, ge, ee, threshold)
    assert s == -1 or 0 <= s <= 1
    if s >= 0:
        assert np.linalg.norm(s * G + (1 - s) * E) <= threshold * (1 + 1e-12)
