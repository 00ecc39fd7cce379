"""The judge tells right from wrong answers, and this package's solvers are right by it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pysolve as ps
from pysolve.testing import (
    HostileProblem,
    check_solver,
    hostile_problem,
    hostile_problems,
    judge,
    judge_solver,
)
from pysolve.testing.__main__ import main, own_solver


def newton(problem, lam=None, **options):
    how = {"group_size": problem.group_size, "weights": problem.weights}
    return ps.newton((problem.r_xx, problem.r_yx), lam or problem.lam, **how, **options)


def easy(seed=0, h=2, d=6):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((40, d))
    y = x @ rng.standard_normal((d, h))
    return HostileProblem(x.T @ x / 40, y.T @ x / 40, 0.5, 2, np.ones(d // 2), None, (), seed)


@settings(max_examples=25)
@given(problem=hostile_problems())
def test_no_claim_of_this_package_is_proven_wrong(problem):
    assert judge_solver(own_solver(problem.seed), problem).faults == ()


@given(problem=hostile_problems())
def test_a_problem_is_the_same_each_time_and_as_told(problem):
    again = hostile_problem(problem.seed)
    np.testing.assert_array_equal(problem.r_xx, again.r_xx)
    np.testing.assert_array_equal(problem.r_yx, again.r_yx)
    assert problem.lam == again.lam > 0
    assert repr(problem) == repr(again)
    assert len(problem.r_xx) == problem.groups * problem.group_size


@settings(max_examples=8)
@given(seed=st.integers(0, 99), size=st.floats(1e-3, 1.0))
def test_a_worse_matrix_with_the_claims_of_the_solution_is_found_out(seed, size):
    problem = easy(seed)
    solution = newton(problem, tol=1e-10)
    assert judge(problem, solution, tol=1e-8).faults == ()
    wrong = replace(solution, M=solution.M + size * np.random.default_rng(seed).standard_normal((2, 6)))
    faults = " ".join(judge(problem, wrong, tol=1e-8).faults)
    assert "above another, the gap said" in faults
    assert "the objective is" in faults


def test_what_it_finds_is_between_the_bound_and_the_answer():
    problem = easy()
    for M in (np.zeros((2, 6)), newton(problem, max_iter=1).M, newton(problem).M):
        verdict = judge(problem, M)
        assert verdict.bound <= verdict.lowest * (1 - 1e-15)
        assert verdict.lowest - verdict.bound <= 1e-9 * abs(verdict.lowest)
        assert verdict.lowest <= verdict.objective


@dataclass(frozen=True)
class Claim:
    M: np.ndarray
    gap: float = 1e9
    keep: object = None
    relative_gap: float = 0.0


@pytest.mark.parametrize("seed", [100589])
def test_what_the_fuzzer_has_found_is_right(seed):
    """Least squares along a direction in which rounding leaves R indefinite certified zero."""
    assert judge_solver(own_solver(seed), hostile_problem(seed)).faults == ()


@pytest.mark.parametrize(
    ("claim", "fault"),
    [
        (Claim(np.full((2, 6), np.nan)), "M is not finite"),
        (Claim(np.zeros((6, 2))), r"M is \(6, 2\), not \(2, 6\)"),
        (Claim(np.zeros((2, 6)), gap=-1.0), "the gap is -1"),
        (Claim(np.zeros((2, 6)), gap=float("nan")), "the gap is nan"),
        (Claim(np.zeros((2, 6)), gap=0.0), "above another, the gap said 0"),
        (Claim(np.zeros((2, 6)), keep=[1]), r"keep is \[1\], but groups \[\] are not zero"),
        (Claim(np.zeros((2, 6)), relative_gap=float("inf")), "relative_gap is inf"),
    ],
)
def test_false_claims_are_named(claim, fault):
    problem = easy()
    if claim.keep is None:
        claim = replace(claim, keep=[0] if claim.M.shape == (2, 6) and claim.M.any() else [])
    with pytest.raises(AssertionError, match=fault):
        assert not (faults := judge(problem, claim).faults), "; ".join(faults)


def test_other_solvers_are_checked_by_their_matrices_alone():
    def proximal_gradient(r_xx, r_yx, lam, *, group_size, weights, M0):
        return np.zeros_like(r_yx)

    with pytest.raises(AssertionError, match=r"hostile_problem\(\d+\): .* above another"):
        check_solver(proximal_gradient, problems=20, tol=1e-3)


def test_the_command_tells_seeds_and_what_was_wrong(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["testing", "--seed", "7", "--problems", "3"])
    assert main() == 0
    assert "3 problems, seeds 7 to 9: 0 wrong" in capsys.readouterr().out
    monkeypatch.setattr("pysolve.testing.__main__.lam_max", lambda *given, **how: 1e300)
    assert main() == 1
    assert "hostile_problem(7)" in capsys.readouterr().out
