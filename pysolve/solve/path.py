"""Solutions along lam: a whole path, or the lam that keeps a given number of groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import numpy as np
import numpy.typing as npt

from pysolve.errors import PysolveError, whole
from pysolve.solve.certificate import lam_max
from pysolve.solve.problem import Problem, Problems, problem_of, takes_problem
from pysolve.solve.solution import Solution
from pysolve.solve.solvers import Stopping, solver_named


@takes_problem
def regularization_path(
    problem: Problems,
    lams: Sequence[float] | None = None,
    *,
    n_lams: int = 50,
    ratio: float = 1e-3,
    method: str = "newton",
    group_size: int | None = None,
    weights: npt.ArrayLike | None = None,
    **options: Unpack[Stopping],
) -> list[Solution]:
    """One solution a lam, from the largest lam down, each started from the one before.

    Parameters
    ----------
    problem, method, group_size, weights, **options
        As in ``solve_linear_reconstruction``.
    lams : sequence of float, optional
        Default: ``n_lams`` values from lam_max down to ratio · lam_max, evenly spaced in log lam.
    n_lams : int
    ratio : float
        In (0, 1).

    Returns
    -------
    list of Solution
        In order of falling lam.

    Raises
    ------
    PysolveError
        No penalised group has any effect on the outputs, so there is no lam_max to start from.
    ValueError, TypeError
        For input that is no such problem.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> [len(solution.keep) for solution in ps.regularization_path((r_xx, r_yx), n_lams=5)]
    [0, 5, 5, 5, 5]
    """
    solve, problem = solver_named(method), problem_of(problem, group_size, weights)
    if lams is None:
        if not 0 < ratio < 1:
            raise ValueError(f"ratio must be in (0, 1), got {ratio}.")
        lams = list(_highest(problem) * np.geomspace(1.0, ratio, whole("n_lams", n_lams, 1, 2**31 - 1)))
    solutions: list[Solution] = []
    for lam in sorted(lams, reverse=True):
        M0 = solutions[-1].M if solutions else None
        solutions.append(solve(problem, float(lam), M0=M0, **options))
    return solutions


@takes_problem
def lam_for_groups(
    problem: Problems,
    k: int,
    *,
    max_solves: int = 60,
    method: str = "newton",
    group_size: int | None = None,
    weights: npt.ArrayLike | None = None,
    **options: Unpack[Stopping],
) -> tuple[Solution, ...]:
    """The solution whose lam keeps exactly k groups; where none does, the two next to the jump over k.

    The number of groups falls in jumps as lam grows, so a given k need not exist. Bisection on log lam with
    warm starts.

    Parameters
    ----------
    problem, method, group_size, weights, **options
        As in ``solve_linear_reconstruction``.
    k : int
        Wanted number of groups, at least 1; unpenalised groups count.
    max_solves : int
        At most this many; the bracket halves with each.

    Returns
    -------
    tuple of Solution
        One that keeps exactly k groups, or two: the nearest found with more and with fewer. One with fewer
        where no lam down to 1e-12 lam_max keeps as many, as with dead inputs.

    Raises
    ------
    PysolveError
        No penalised group has any effect on the outputs, so there is nothing to choose.
    ValueError, TypeError
        For input that is no such problem, or a k out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> (solution,) = ps.lam_for_groups((r_xx, r_yx), k=4)
    >>> solution.keep.size
    4
    """
    k, max_solves = whole("k", k), whole("max_solves", max_solves)
    solve, problem = solver_named(method), problem_of(problem, group_size, weights)
    highest = lam = _highest(problem)
    fewer, more = solve(problem, highest, **options), None
    if not len(fewer.keep) <= k <= problem.groups:
        raise ValueError(
            f"k must lie between the {len(fewer.keep)} unpenalised groups and all {problem.groups}, got {k}."
        )
    if len(fewer.keep) == k:
        return (fewer,)
    for _ in range(max_solves):
        # Down in growing steps until enough groups are kept, then between.
        lam = math.sqrt(more.lam * fewer.lam) if more else lam * lam / highest if lam < highest else lam / 2
        if lam < SMALLEST_LAM * highest or (more and more.lam > (1 - 1e-12) * fewer.lam):
            break
        found = solve(problem, lam, M0=(more or fewer).M, **options)
        if len(found.keep) == k:
            return (found,)
        fewer, more = (fewer, found) if len(found.keep) > k else (found, more)
    return (more, fewer) if more else (fewer,)


# Below this share of lam_max, rounding decides which groups are zero.
SMALLEST_LAM = 1e-12


def _highest(problem: Problem) -> float:
    highest = lam_max(problem)
    if not highest:
        raise PysolveError("no penalised group has any effect on the outputs: r_yx says nothing of them.")
    return highest
