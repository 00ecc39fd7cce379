"""Any solver on hostile problems, before the judge."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

from pysolve.correlations import Array
from pysolve.testing.judge import Verdict, judge
from pysolve.testing.problems import HostileProblem, hostile_problem

# What a solver may take, in seconds of this process.
PATIENCE = 10.0


class Solve(Protocol):
    """A solver: returns M (h, d), or an object with M and claims: gap, objective, keep, shift."""

    def __call__(
        self, r_xx: Array, r_yx: Array, lam: float, *, group_size: int, weights: Array, M0: Array | None
    ) -> object: ...


def check_solver(solve: Solve, *, problems: int = 200, seed: int = 0, tol: float | None = None) -> None:
    """AssertionError with seed and fault at the first hostile problem that a solver gets wrong.

    Parameters
    ----------
    solve : callable
        ``solve(r_xx, r_yx, lam, group_size=, weights=, M0=)`` returning M, or an object with M and claims as
        for ``judge``.
    problems, seed : int
        How many, from which on.
    tol : float, optional
        As for ``judge``; without it, only what the solver claims is judged.

    Examples
    --------
    >>> import pysolve as ps
    >>> ps.check_solver(ps.newton, problems=3)
    """
    for number in range(seed, seed + problems):
        problem = hostile_problem(number)
        faults = judge_solver(solve, problem, tol=tol).faults
        if faults:
            raise AssertionError(f"{problem}: {'; '.join(faults)}")


def judge_solver(solve: Solve, problem: HostileProblem, *, tol: float | None = None) -> Verdict:
    """``judge`` the answer of a solver to one problem, and the time it takes."""
    began = time.process_time()
    answer = solve(
        problem.r_xx,
        problem.r_yx,
        problem.lam,
        group_size=problem.group_size,
        weights=problem.weights,
        M0=problem.M0,
    )
    seconds = time.process_time() - began
    verdict = judge(problem, answer, tol=tol)
    if seconds > PATIENCE:
        verdict = replace(verdict, faults=(*verdict.faults, f"took {seconds:.1f} s"))
    return verdict
