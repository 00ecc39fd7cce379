"""From a wanted number of groups to lam."""

import numpy as np
import pytest

from pysolve.correlations import Correlations
from pysolve.errors import PysolveError
from pysolve.path import solve_for_groups


def layer(d=40, h=3, n=500):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 1, 0)
    samples = Correlations.from_samples(x, x @ rng.standard_normal((d, h)))
    return samples.r_xx, samples.r_yx


@pytest.mark.parametrize("groups", [1, 5, 20, 39])
def test_about_as_many_groups_are_kept_as_wanted(groups):
    solution = solve_for_groups(*layer(), groups)
    assert abs(len(solution.keep) - groups) <= 1
    assert solution.converged


def test_groups_of_several_inputs_count_once():
    solution = solve_for_groups(*layer(), 4, group_size=4)
    assert len(solution.keep) == 4


def test_an_unpenalised_group_counts():
    weights = np.ones(40)
    weights[7] = 0
    solution = solve_for_groups(*layer(), 5, weights=weights)
    assert 7 in solution.keep
    assert abs(len(solution.keep) - 5) <= 1


def test_options_reach_the_solver():
    solution = solve_for_groups(*layer(), 5, method="fista", tol=1e-6)
    assert solution.method == "fista"
    assert solution.relative_gap <= 1e-6


def test_a_number_beyond_all_groups_keeps_nearly_all():
    assert len(solve_for_groups(*layer(), 1000).keep) == 40


def test_outputs_that_nothing_explains_are_refused():
    r_xx, r_yx = layer()
    with pytest.raises(PysolveError, match="no penalised group has any effect"):
        solve_for_groups(r_xx, np.zeros_like(r_yx), 3)


@pytest.mark.parametrize("options", [{"groups": 0}, {"groups": 3, "max_solves": 0}])
def test_counts_below_one_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        solve_for_groups(*layer(), **options)
