"""The convex solvers: reconstruct a layer from its correlations through few of its input groups."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from pysolve import _core
from pysolve.errors import check_flags, one_of, whole
from pysolve.solve.certificate import certificate_of, lift_of, relative, shift_of
from pysolve.solve.problem import (
    Matrices,
    Problems,
    answers_of,
    check_lam,
    half_trace,
    one_or_all,
    problem_of,
    takes_problem,
)
from pysolve.solve.scaling import reduce, refitted, restore, scale
from pysolve.solve.solution import History, Solution

Callback = Callable[[int, float, float], None]
Core = Callable[..., _core.Result]

MAX_ITER = {"newton": 1_000, "alternate_minimization": 50_000, "fista": 50_000, "proximal_gradient": 50_000}


class Stopping(TypedDict, total=False):
    """Options of a single solve."""

    r_yy: npt.ArrayLike | Sequence[npt.ArrayLike] | None
    tol: float
    max_iter: int | None
    callback: Callback | None


class Options(Stopping, total=False):
    """Options that all solvers share; ``solve_linear_reconstruction`` describes them."""

    group_size: int | None
    weights: npt.ArrayLike | None
    M0: npt.ArrayLike | Matrices | None


@takes_problem
def solve_linear_reconstruction(
    problem: Problems, lam: float, method: str = "newton", **options: Unpack[Options]
) -> Solution:
    """Reconstruct y from x through few input groups.

    Solves  min_M  ½ E‖y − M x‖² + lam Σ_g w_g ‖M_g‖_F  from correlations alone.

    Parameters
    ----------
    problem : Correlations; or r_xx, r_yx : (d, d) and (h, d) arrays or CPU tensors
        E[x xᵀ], symmetric positive semi-definite and perhaps singular, and E[y xᵀ]: as two arguments or as
        one tuple. Lists of matrices, or one list of problems, describe several readers of the same inputs,
        which share their groups: the objective sums over them, and ‖M_g‖ runs over all their matrices.
    lam : float
        > 0. From ``lam_max(r_xx, r_yx)`` on, every penalised group is zero.
    method : {"newton", "alternate_minimization", "fista", "proximal_gradient"}
    group_size : int
        Consecutive inputs that form one group; divides d. Default that of the Correlations, otherwise 1.
    weights : (groups,) array, optional
        w_g ≥ 0, default 1; 0 leaves a group unpenalised (a bias input).
    r_yy : (h, h) array, (h,) diagonal or float trace, optional
        E[y yᵀ], or a list of one for each of several readers; adds its half trace to the objective, which
        then is the penalised reconstruction error, and to which ``tol`` is relative then: give it where lam
        is small and the fit nearly perfect, for otherwise tol · ½ E‖y‖² may exceed the whole penalty.
    tol : float
        Stop when the certified relative gap is at most this; default 1e-8.
    max_iter : int, optional
        Default 1,000 for newton, otherwise 50,000.
    M0 : (h, d) array, optional
        Warm start; one for each of several readers. Zero is taken instead where that is nearer, P(M0) ≥ P(0).
    callback : callable(iteration, objective, gap), optional
        Called every iteration; an exception it raises ends the solve.

    Returns
    -------
    Solution
        Also when ``tol`` was not reached: see its ``status`` and ``gap``.

    Raises
    ------
    ValueError, TypeError
        For input that is no such problem, or an unknown method.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> lam = 0.1 * ps.lam_max(r_xx, r_yx)
    >>> solution = ps.solve_linear_reconstruction(r_xx, r_yx, lam)
    >>> solution.keep
    array([0, 1, 2, 3, 4])
    >>> solution.status, solution.relative_gap <= 1e-8
    ('converged', True)
    """
    return solver_named(method)(problem, lam, **options)


@takes_problem
def proximal_gradient(problem: Problems, lam: float, **options: Unpack[Options]) -> Solution:
    """Plain forward–backward splitting: M ← prox_{lam/L}(M − (M R − C)/L), L ≥ λ_max(R).

    Solves the problem of ``solve_linear_reconstruction``, and takes what that takes.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> ps.proximal_gradient((r_xx, r_yx), lam=0.1, tol=1e-6).keep
    array([0, 1, 2, 3, 4])
    """
    core = partial(_core.fista, momentum=False, restart=False, q=0.0)
    return _solve("proximal_gradient", core, problem, lam, **options)


@takes_problem
def fista(
    problem: Problems, lam: float, *, q: float = 0.0, restart: bool = True, **options: Unpack[Options]
) -> Solution:
    """Accelerated proximal gradient: look-ahead M + (k − 1)/(k + q + 2) (M − M_previous) before each step.

    ``restart`` forgets the momentum whenever it points uphill, and holds it below what the curvature measured
    along the last step allows, which makes the convergence linear on most problems; without it, this is the
    published look-ahead. Without an ``M0``, the start is one ridge solve. Problem and other options as in
    ``solve_linear_reconstruction``.

    References
    ----------
    A. Beck, M. Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009.
    B. O'Donoghue, E. Candès, Adaptive restart for accelerated gradient schemes, 2015.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> ps.fista((r_xx, r_yx), lam=0.1, tol=1e-6).keep
    array([0, 1, 2, 3, 4])
    """
    check_flags(restart=restart)
    if not -2 < q < np.inf:
        raise ValueError(f"q must be finite and greater than -2, got {q}.")
    core = partial(_core.fista, momentum=True, restart=bool(restart), q=float(q))
    return _solve("fista", core, problem, lam, **options)


@takes_problem
def alternate_minimization(
    problem: Problems, lam: float, *, rounds: int = 50, epsilon: float = 1e-10, **options: Unpack[Options]
) -> Solution:
    """Alternate u_g = sqrt(‖M_g‖² + epsilon) and M (R + lam diag(w/u)) = C, then polish with FISTA.

    ``epsilon`` is relative to the problem scaled to λ_max = 1. Problem and other options as in
    ``solve_linear_reconstruction``.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> ps.alternate_minimization((r_xx, r_yx), lam=0.1, rounds=20).keep
    array([0, 1, 2, 3, 4])
    """
    if not 0 < epsilon < np.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}.")
    count = whole("rounds", rounds, 1, 2**31 - 1)
    core = partial(_core.alternate_minimization, rounds=count, epsilon=float(epsilon))
    return _solve("alternate_minimization", core, problem, lam, **options)


@takes_problem
def newton(problem: Problems, lam: float, **options: Unpack[Options]) -> Solution:
    """Newton's method on the variational form: one positive scale for each active group, whatever h is.

    Minimises  φ(η) = min_M ½⟨M R, M⟩ − ⟨C, M⟩ + ½ lam Σ_g w_g (‖M_g‖²/η_g + η_g)  over η ≥ 0, with the exact
    Hessian, on a working set of groups. Quadratic convergence, exact zeros; a step costs about
    4/3 a³ + 3 h a² for a active columns; an iteration is one round over all groups, of which few are needed.
    Problem and options as in ``solve_linear_reconstruction``.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> ps.newton((r_xx, r_yx), lam=0.1).keep
    array([0, 1, 2, 3, 4])
    """
    return _solve("newton", _core.newton, problem, lam, **options)


_SOLVERS: dict[str, Callable[..., Solution]] = {
    "proximal_gradient": proximal_gradient,
    "fista": fista,
    "alternate_minimization": alternate_minimization,
    "newton": newton,
}


def solver_named(method: str) -> Callable[..., Solution]:
    """The solver function of that name; ValueError naming the choices."""
    return _SOLVERS[one_of("method", method, sorted(_SOLVERS))]


def _solve(
    method: str,
    core: Core,
    problem: Problems,
    lam: float,
    *,
    group_size: int | None = None,
    weights: npt.ArrayLike | None = None,
    r_yy: npt.ArrayLike | Sequence[npt.ArrayLike] | None = None,
    tol: float = 1e-8,
    max_iter: int | None = None,
    M0: npt.ArrayLike | Matrices | None = None,
    callback: Callback | None = None,
) -> Solution:
    began = time.perf_counter()
    problem, lam = problem_of(problem, group_size, weights), check_lam(lam)
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}.")
    limit = MAX_ITER[method] if max_iter is None else whole("max_iter", max_iter, 0, 2**31 - 1)
    known = half_trace(r_yy, [len(C) for C in problem.yx])
    scaled = scale(problem, known)
    constant, energy = scaled.constant + known, scaled.unit**2

    def report(iteration: int, objective: float, gap: float) -> None:
        assert callback is not None
        callback(iteration, objective * energy + constant, gap * energy)

    start = np.zeros(scaled.shape)
    if M0 is not None:
        start = reduce(scaled, answers_of("M0", M0, problem, largest=np.inf), lam)
    scaled_lam = lam / scaled.unit
    if lam >= scaled.lam_max * (1 - 1e-13):
        # Zero is the solution; rounding in the scaled C must not make the core doubt it.
        start, scaled_lam = np.zeros_like(start), max(scaled_lam, 1.0) * (1 + 1e-12)
    result = core(
        scaled.core,
        scaled_lam,
        start,
        tol=float(tol),
        max_iter=limit,
        callback=None if callback is None else report,
    )
    M = restore(scaled, result.M.reshape(scaled.shape))
    objective, gap = result.objective * energy + constant, result.gap * energy
    kkt = float((result.kkt * scaled.gradient_scale).max(initial=0.0))
    if len(scaled.unpenalised):
        # The core's gap is that of the problem after elimination, which rounding has changed.
        M = refitted(scaled, M)
        judged = certificate_of(problem, M, lam)
        objective, gap, kkt = judged.objective + known, judged.gap, judged.kkt
    else:
        lift = lift_of(problem, M)
        objective, gap = objective - lift, gap + lift
    relative_gap = relative(gap, objective)
    reached = relative_gap <= tol
    # The core itself ends early only where it is as near as it can tell.
    ended = result.gap <= result.floor or result.iterations < limit
    seconds, objectives, gaps = result.history.T
    return Solution(
        M=one_or_all(M),
        keep=np.flatnonzero(np.any([m.any(0) for m in M], axis=0).reshape(-1, problem.group_size).any(1)),
        lam=lam,
        objective=objective,
        gap=gap,
        relative_gap=relative_gap,
        kkt=kkt,
        iterations=result.iterations,
        method=method,
        seconds=time.perf_counter() - began,
        status="converged" if reached else "precision" if ended else "max_iter",
        history=History(seconds, objectives * energy + constant, gaps * energy),
        shift=shift_of(problem),
    )
