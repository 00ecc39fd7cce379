import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import instances

import pysolve as ps


def layer(d=40, h=3, n=500, group_size=1):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 1, 0)
    return ps.Correlations.from_samples(x, x @ rng.standard_normal((d, h)), group_size=group_size)


@given(instances(max_groups=5))
def test_a_path_equals_cold_solves(case):
    lams = case.lam_max * np.array([0.9, 0.3, 0.1])
    path = ps.regularization_path(case.r_xx, case.r_yx, lams, group_size=case.group_size, tol=1e-9)
    assert [one.lam for one in path] == list(lams)
    for warm in path:
        cold = ps.newton((case.r_xx, case.r_yx), warm.lam, group_size=case.group_size, tol=1e-9)
        slack = 1e-10 * np.trace(case.r_yy)
        assert warm.objective == pytest.approx(cold.objective, abs=warm.gap + cold.gap + slack)


def test_an_automatic_path_starts_at_zero_groups_and_falls_to_the_ratio():
    problem = layer()
    path = ps.regularization_path(problem, n_lams=10, ratio=0.01)
    assert len(path) == 10
    assert len(path[0].keep) == 0
    assert path[0].lam == pytest.approx(ps.lam_max(problem))
    assert path[-1].lam == pytest.approx(0.01 * path[0].lam)
    assert np.all(np.diff([one.lam for one in path]) < 0)
    assert all(one.converged for one in path)


@given(instances(max_groups=6), st.data())
def test_exactly_k_groups_or_the_two_next_to_the_jump(case, data):
    k = data.draw(st.integers(1, case.groups))
    found = ps.lam_for_groups(case.r_xx, case.r_yx, k, group_size=case.group_size)
    kept = [len(one.keep) for one in found]
    if len(found) == 1:
        if kept[0] != k:
            small = ps.newton((case.r_xx, case.r_yx), 1e-4 * case.lam_max, group_size=case.group_size)
            assert max(kept[0], len(small.keep)) < k  # no lam keeps as many
        return
    assert kept[0] > k > kept[1]
    assert found[0].lam < found[1].lam
    assert found[0].lam > (1 - 1e-9) * found[1].lam


@pytest.mark.parametrize("k", [1, 5, 20, 39])
@pytest.mark.parametrize("method", ["newton", "fista"])
def test_a_generic_layer_has_a_lam_for_every_k(k, method):
    (found,) = ps.lam_for_groups(layer(), k=k, method=method, tol=1e-6)
    assert len(found.keep) == k
    assert found.method == method
    assert found.relative_gap <= 1e-6


def test_groups_of_several_inputs_count_once():
    (found,) = ps.lam_for_groups(layer(group_size=4), k=4)
    assert len(found.keep) == 4


def test_unpenalised_groups_count():
    weights = np.ones(40)
    weights[7] = 0
    (found,) = ps.lam_for_groups(layer(), k=5, weights=weights)
    assert 7 in found.keep
    assert len(found.keep) == 5
    with pytest.raises(ValueError, match="between the 2 unpenalised groups and all 40, got 1"):
        ps.lam_for_groups(layer(), k=1, weights=weights - np.eye(40)[0])


def test_several_readers_share_the_lam():
    problem = layer()
    split = [(problem.r_xx, problem.r_yx[:1]), (problem.r_xx, problem.r_yx[1:])]
    (joint,), (single,) = ps.lam_for_groups(split, k=9), ps.lam_for_groups(problem, k=9)
    np.testing.assert_array_equal(joint.keep, single.keep)
    assert len(ps.regularization_path(split, n_lams=3)) == 3


def test_outputs_that_nothing_explains_are_refused():
    problem = layer()
    with pytest.raises(ps.PysolveError, match="no penalised group has any effect"):
        ps.lam_for_groups(problem.r_xx, np.zeros_like(problem.r_yx), 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ps.lam_for_groups(layer(), k=0), "k must be an integer of at least 1, got 0"),
        (lambda: ps.lam_for_groups(layer(), k=41), "all 40, got 41"),
        (lambda: ps.lam_for_groups(layer(), k=3, method="adam"), "unknown method 'adam'"),
        (lambda: ps.regularization_path(layer(), n_lams=0), "n_lams must be an integer within 1"),
        (lambda: ps.regularization_path(layer(), ratio=1.0), r"ratio must be in \(0, 1\)"),
        (lambda: ps.regularization_path(layer(), lams=[1.0, -1.0]), "lam must be positive"),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
