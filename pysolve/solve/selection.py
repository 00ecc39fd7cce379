"""Selection of k groups to keep, by each of several methods, on the same correlations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from pysolve import _core
from pysolve.correlations import Array, Indices, all_but, group_norms
from pysolve.errors import PysolveError, one_of, whole
from pysolve.solve.elimination import (
    RIDGES,
    SIZE,
    Scaled,
    eliminate,
    nested_errors,
    scale_to_unit_variance,
)
from pysolve.solve.least_squares import Ridge, least_squares
from pysolve.solve.path import lam_for_groups
from pysolve.solve.problem import Problem, Problems, problem_of, takes_problem
from pysolve.solve.solution import Solution

# Exchanges, and how many of the cheapest groups to take out are tried before giving up on one more.
MAX_SWAPS, SWAP_DEPTH = 1000, 10
# Of the lasso, before a jump over k is taken for one.
LASSO_SOLVES = 25


@takes_problem
def select_channels(
    problem: Problems,
    k: int,
    *,
    method: str = "elimination",
    group_size: int | None = None,
    ridge: Ridge = "auto",
) -> Indices:
    """The k groups to keep.

    Seeks  min_A min_M ½ E‖y − M x‖²  over sets A of k groups and M that is zero outside A.

    Parameters
    ----------
    problem, group_size
        As in ``solve_linear_reconstruction``.
    k : int
        1 … groups.
    method : str
        "elimination" (group OBS): start from all, remove the group whose loss costs least.
        "forward": start from none, add the group that gains most; cheap for small k.
        "swap": elimination and, for k up to a quarter of the groups, forward selection, then exchanges of one
        group for another while the error falls; the better of the two.
        "lasso": the lam at which k groups are not zero; where the path jumps over k, the k largest ‖M_g‖ of
        the next larger set. "weighted_lasso": the same with weights 1/‖B_g‖, B the least-squares solution.
        "magnitude": the largest ‖B_g‖_F, where B = C R⁺ is the layer's own weight if y = B x.
        "activation": the largest mean squares Σ_{i∈g} E[x_i²].
    ridge : float or "auto"
        As in ``elimination_path``; for "elimination", "forward" and "swap".

    Returns
    -------
    (k,) int array
        Ascending.

    Raises
    ------
    ValueError, TypeError
        For input that is no such problem, an unknown method, or a k out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> ps.select_channels((r_xx, r_yx), k=5)
    array([0, 1, 2, 3, 4])
    """
    selector = _SELECTORS[one_of("method", method, METHODS)]
    problem = problem_of(problem, group_size)
    problem = replace(problem, weights=np.ones(problem.groups))
    return np.sort(selector(problem, whole(SIZE, k, 1, problem.groups), ridge))


def _elimination(problem: Problem, k: int, ridge: Ridge) -> Indices:
    scaled = scale_to_unit_variance(problem)
    removed, _ = eliminate(scaled, ridge, k)
    return _filled(problem, np.delete(scaled.live, removed), k)


def _forward(problem: Problem, k: int, ridge: Ridge) -> Indices:
    scaled = scale_to_unit_variance(problem)
    return _filled(problem, scaled.live[_added(scaled, k, RIDGES[0] if ridge == "auto" else ridge)], k)


def _swap(problem: Problem, k: int, ridge: Ridge) -> Indices:
    scaled = scale_to_unit_variance(problem)
    removed, path = eliminate(scaled, ridge, k)
    starts = [np.delete(np.arange(len(scaled.live)), removed)]
    if 4 * k <= len(scaled.live):
        starts.append(_added(scaled, k, path.ridge))
    kept = [polish(scaled, start, path.ridge) for start in starts]
    best = min(kept, key=lambda keep: nested_errors(scaled, keep, path.ridge)[-1])
    return _filled(problem, scaled.live[best], k)


def polish(scaled: Scaled, keep: Indices, ridge: float) -> Indices:
    """Exchange groups of ``keep`` (live ones) for others while that lowers the error; never worse."""
    swapped = _core.swap_groups(
        scaled.core, keep.tolist(), ridge=ridge, max_swaps=MAX_SWAPS, depth=SWAP_DEPTH
    )
    after = np.array(swapped, dtype=np.intp)
    # Errors are computed afresh, since long chains of updates round.
    return min(keep, after, key=lambda groups: nested_errors(scaled, groups, ridge)[-1])


def _added(scaled: Scaled, k: int, ridge: float) -> Indices:
    count = min(k, len(scaled.live))
    return np.array(_core.forward(scaled.core, ridge=float(ridge), count=count).order, dtype=np.intp)


def _filled(problem: Problem, keep: Indices, k: int) -> Indices:
    """``keep``, with dead groups where there are too few others."""
    rest = all_but(problem.groups, keep)
    return np.concatenate([keep, rest[: k - len(keep)]])


def lasso_solution(problem: Problem, k: int, *, weighted: bool = False) -> tuple[Problem, Solution] | None:
    """The problem and its solution from which "lasso", or "weighted_lasso", takes k groups.

    None when no group has any effect on the outputs.
    """
    if weighted:
        norms = _fit_norms(problem)
        weights = 1.0 / np.maximum(norms, 1e-6 * norms.max() or 1.0)
        problem = replace(problem, weights=weights * (norms.max() or 1.0))
    try:
        return problem, lam_for_groups(problem, k=k, max_solves=LASSO_SOLVES, tol=1e-6)[0]
    except PysolveError:
        return None


def _lasso(problem: Problem, k: int, ridge: Ridge, weighted: bool = False) -> Indices:
    found = lasso_solution(problem, k, weighted=weighted)
    if found is None:
        return np.arange(k)
    return _largest(group_norms(found[1].readers, problem.group_size), k)


def _magnitude(problem: Problem, k: int, ridge: Ridge) -> Indices:
    return _largest(_fit_norms(problem), k)


def _activation(problem: Problem, k: int, ridge: Ridge) -> Indices:
    power = np.sum([np.diag(R) for R in problem.xx], axis=0)
    return _largest(power.reshape(-1, problem.group_size).sum(1), k)


def _fit_norms(problem: Problem) -> Array:
    """‖B_g‖_F of the least-squares solution on all groups."""
    columns = np.arange(problem.inputs)
    B = [least_squares(R, C, columns) for R, C in zip(problem.xx, problem.yx, strict=True)]
    return group_norms(B, problem.group_size)


def _largest(strength: Array, k: int) -> Indices:
    return np.argsort(-strength, kind="stable")[:k]


_SELECTORS: dict[str, Callable[[Problem, int, Ridge], Indices]] = {
    "elimination": _elimination,
    "swap": _swap,
    "forward": _forward,
    "lasso": _lasso,
    "weighted_lasso": partial(_lasso, weighted=True),
    "magnitude": _magnitude,
    "activation": _activation,
}
METHODS = tuple(sorted(_SELECTORS))
