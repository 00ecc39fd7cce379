"""The convex solvers: reconstruct a layer from its correlations with as few input channels as lam allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pysolve import _core
from pysolve.correlations import Array, group_norms
from pysolve.solve.problem import as_problem, check_lam, checked_matrix, half_trace
from pysolve.solve.scaling import Scaled, reduce, restore, scale
from pysolve.solve.solution import History, Solution

Callback = Callable[[int, float, float], None]
Core = Callable[..., _core.Result]

MAX_ITER = {
    "newton": 1_000,
    "alternate_minimization": 50_000,
    "fista": 50_000,
    "proximal_gradient": 50_000,
}


def solve_linear_reconstruction(
    r_xx: Any,
    r_yx: Any,
    lam: float,
    method: str = "newton",
    *,
    group_size: int = 1,
    weights: npt.ArrayLike | None = None,
    r_yy: Any = None,
    tol: float = 1e-8,
    max_iter: int | None = None,
    M0: Any = None,
    callback: Callback | None = None,
) -> Solution:
    """Reconstruct y from x through few input groups.

    Solves  min_M  ½ E‖y − M x‖² + lam Σ_g w_g ‖M_g‖_F  from correlations alone.

    Parameters
    ----------
    r_xx : (d, d) array or CPU tensor
        E[x xᵀ], symmetric positive semi-definite; singular is fine.
    r_yx : (h, d) array or CPU tensor
        E[y xᵀ].
    lam : float
        > 0. From ``lam_max(r_xx, r_yx)`` on, every penalised group is zero.
    method : {"newton", "alternate_minimization", "fista", "proximal_gradient"}
    group_size : int
        Consecutive inputs that form one group; divides d.
    weights : (groups,) array, optional
        w_g ≥ 0, default 1; 0 leaves a group unpenalised (a bias input).
    r_yy : (h, h) array, (h,) diagonal or float trace, optional
        E[y yᵀ]; adds its half trace to the objective, which then is the penalised reconstruction error.
    tol : float
        Stop when the certified relative gap is at most this.
    max_iter : int, optional
        Default 1,000 for newton, otherwise 50,000.
    M0 : (h, d) array, optional
        Warm start.
    callback : callable(iteration, objective, gap), optional
        Called every iteration; an exception it raises ends the solve.

    Returns
    -------
    Solution
        Also when ``tol`` was not reached: see its ``status`` and ``gap``.

    Raises
    ------
    ValueError, TypeError
        For input that is no such problem.
    """
    return solver_named(method)(
        (r_xx, r_yx), lam, group_size=group_size, weights=weights, r_yy=r_yy, tol=tol, max_iter=max_iter,
        M0=M0, callback=callback,
    )  # fmt: skip


def proximal_gradient(problems: Any, lam: float, **options: Any) -> Solution:
    """Plain forward–backward splitting: M ← prox_{lam/L}(M − (M R − C)/L), L ≥ λ_max(R).

    ``problems`` is one problem or a list of problems that share their groups, each a Correlations or a pair
    (r_xx, r_yx). Options as in ``solve_linear_reconstruction``.
    """
    return _solve("proximal_gradient", _fista_core(momentum=False), problems, lam, **options)


def fista(problems: Any, lam: float, *, q: float = 0.0, restart: bool = True, **options: Any) -> Solution:
    """Accelerated proximal gradient: look-ahead M + (k − 1)/(k + q + 2) (M − M_previous) before each step.

    ``restart`` forgets the momentum whenever it points uphill, and holds it below what the curvature measured
    along the last step allows, which makes the convergence linear on most problems; without it, this is the
    published look-ahead. Without an ``M0``, the start is one ridge solve. Problems as in
    ``proximal_gradient``, other options as in ``solve_linear_reconstruction``. Source: Beck & Teboulle 2009;
    restart: O'Donoghue & Candès 2015.
    """
    if not q > -2:
        raise ValueError(f"q must be greater than -2, got {q}.")
    return _solve("fista", _fista_core(momentum=True, restart=restart, q=float(q)), problems, lam, **options)


def alternate_minimization(
    problems: Any, lam: float, *, rounds: int = 50, epsilon: float = 1e-10, **options: Any
) -> Solution:
    """Alternate u_g = sqrt(‖M_g‖² + epsilon) and M (R + lam diag(w/u)) = C, then polish with FISTA.

    ``epsilon`` is relative to the problem scaled to λ_max = 1. Problems as in ``proximal_gradient``, other
    options as in ``solve_linear_reconstruction``.
    """
    if rounds < 1 or not epsilon > 0:
        raise ValueError(f"rounds must be at least 1 and epsilon positive, got {rounds} and {epsilon}.")

    def core(problem: _core.Problem, lam: float, M0: Array, **stopping: Any) -> _core.Result:
        return _core.alternate_minimization(
            problem, lam, M0, rounds=int(rounds), epsilon=float(epsilon), **stopping
        )

    return _solve("alternate_minimization", core, problems, lam, **options)


def newton(problems: Any, lam: float, **options: Any) -> Solution:
    """Newton's method on the variational form: one positive scale for each active group, whatever h is.

    Minimises  φ(η) = min_M ½⟨M R, M⟩ − ⟨C, M⟩ + ½ lam Σ_g w_g (‖M_g‖²/η_g + η_g)  over η ≥ 0, with the exact
    Hessian, on a working set of groups. Quadratic convergence, exact zeros; a step costs about
    4/3 a³ + 3 h a² for a active columns. Problems as in ``proximal_gradient``, options as in
    ``solve_linear_reconstruction``; an iteration is one round over all groups, of which few are needed.
    """
    return _solve("newton", _core.newton, problems, lam, **options)


_SOLVERS: dict[str, Callable[..., Solution]] = {
    "proximal_gradient": proximal_gradient,
    "fista": fista,
    "alternate_minimization": alternate_minimization,
    "newton": newton,
}


def solver_named(method: str) -> Callable[..., Solution]:
    """The solver function of that name; ValueError naming the choices."""
    try:
        return _SOLVERS[method]
    except (KeyError, TypeError):
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(sorted(_SOLVERS))}.") from None


def _fista_core(*, momentum: bool, restart: bool = False, q: float = 0.0) -> Core:
    def core(problem: _core.Problem, lam: float, M0: Array, **stopping: Any) -> _core.Result:
        return _core.fista(problem, lam, M0, momentum=momentum, restart=restart, q=q, **stopping)

    return core


def _solve(
    method: str,
    core: Core,
    problems: Any,
    lam: float,
    *,
    group_size: int | None = None,
    weights: npt.ArrayLike | None = None,
    r_yy: Any = None,
    tol: float = 1e-8,
    max_iter: int | None = None,
    M0: Any = None,
    callback: Callback | None = None,
) -> Solution:
    began = time.perf_counter()
    problem, lam = as_problem(problems, group_size, weights), check_lam(lam)
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}.")
    if max_iter is not None and max_iter < 0:
        raise ValueError(f"max_iter must be at least 0, got {max_iter}.")
    scaled = scale(problem)
    constant, energy = scaled.constant + half_trace(r_yy), scaled.unit**2

    def report(iteration: int, objective: float, gap: float) -> None:
        assert callback is not None
        callback(iteration, objective * energy + constant, gap * energy)

    start, scaled_lam = _start(scaled, M0), lam / scaled.unit
    if lam >= scaled.lam_max * (1 - 1e-13):
        # Zero is the solution; rounding in the scaled C must not make the core doubt it.
        start, scaled_lam = np.zeros_like(start), max(scaled_lam, 1.0) * (1 + 1e-12)
    result = core(
        scaled.core,
        scaled_lam,
        start,
        tol=float(tol),
        max_iter=MAX_ITER[method] if max_iter is None else int(max_iter),
        callback=None if callback is None else report,
    )
    return _solution(scaled, result, method=method, lam=lam, tol=tol, constant=constant, began=began)


def _solution(
    scaled: Scaled,
    result: _core.Result,
    *,
    method: str,
    lam: float,
    tol: float,
    constant: float,
    began: float,
) -> Solution:
    energy = scaled.unit**2
    M = restore(scaled, result.M.reshape(scaled.shape))
    gap, reference = result.gap * energy, abs(result.objective * energy + scaled.constant)
    relative_gap = 0.0 if gap == 0 else gap / reference if reference else float("inf")
    seconds, objectives, gaps = result.history.T
    return Solution(
        M=M if len(M) > 1 else M[0],
        keep=np.flatnonzero(group_norms(M, scaled.problem.group_size)),
        lam=lam,
        objective=result.objective * energy + constant,
        gap=gap,
        relative_gap=relative_gap,
        kkt=float((result.kkt * scaled.gradient_scale).max(initial=0.0)),
        iterations=result.iterations,
        method=method,
        seconds=time.perf_counter() - began,
        status="converged"
        if relative_gap <= tol
        else "precision"
        if result.gap <= result.floor
        else "max_iter",
        history=History(seconds, objectives * energy + constant, gaps * energy),
    )


def _start(scaled: Scaled, M0: Any) -> Array:
    if M0 is None:
        return np.zeros(scaled.shape)
    wanted = [c.shape for c in scaled.problem.yx]
    start = [checked_matrix("M0", m) for m in (M0 if len(wanted) > 1 else [M0])]
    shapes = [m.shape for m in start]
    if shapes != wanted:
        raise ValueError(f"M0 has shape {shapes}, but the problem needs {wanted}.")
    return reduce(scaled, start)
