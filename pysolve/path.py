"""From a wanted number of groups to lam."""

from __future__ import annotations

import math
from typing import Any

from pysolve.certificate import lam_max
from pysolve.errors import PysolveError
from pysolve.solution import Solution
from pysolve.solvers import solve_linear_reconstruction

# Fewer groups are kept from lam_max down to this share of it; below, next to all of them.
SMALLEST_LAM = 1e-4


def solve_for_groups(r_xx: Any, r_yx: Any, groups: int, *, max_solves: int = 20, **options: Any) -> Solution:
    """The solution that keeps as nearly as possible ``groups`` groups, by bisection on log lam.

    The number kept falls in jumps as lam grows, so a given number need not exist; see ``len(solution.keep)``.

    Parameters
    ----------
    r_xx, r_yx : (d, d) and (h, d) arrays
        As in ``solve_linear_reconstruction``.
    groups : int
        Wanted number of groups, at least 1; unpenalised groups count.
    max_solves : int
        Fewer when the number is met.
    **options
        Of ``solve_linear_reconstruction``.

    Raises
    ------
    PysolveError
        No penalised group has any effect on the outputs, so there is nothing to choose.
    """
    if groups < 1 or max_solves < 1:
        raise ValueError(f"groups and max_solves must be at least 1, got {groups} and {max_solves}.")
    high = lam_max(r_xx, r_yx, group_size=options.get("group_size"), weights=options.get("weights"))
    if not high:
        raise PysolveError("no penalised group has any effect on the outputs: r_yx says nothing of them.")
    low, best = SMALLEST_LAM * high, None
    for _ in range(max_solves):
        lam = math.sqrt(low * high)
        solution = solve_linear_reconstruction(r_xx, r_yx, lam, **options)
        kept = len(solution.keep)
        if best is None or abs(kept - groups) < abs(len(best.keep) - groups):
            best = solution
        if kept == groups:
            break
        low, high = (lam, high) if kept > groups else (low, lam)
    assert best is not None
    return best
