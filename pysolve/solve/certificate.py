"""Distance of a matrix from the solution, by NumPy alone: judges every solver, shares no code with any.

For M (h × d), R = E[x xᵀ], C = E[y xᵀ] and G = M R − C:

    P(M) = ½⟨M R, M⟩ − ⟨C, M⟩ + lam Σ_g w_g ‖M_g‖_F

Every N with ‖(N R − C)_g‖ ≤ lam w_g for all g proves min P ≥ −½⟨N R, N⟩. Here N = s M + (1 − s) B, where B
solves least squares, B R = C + E (E is measured), and s ≤ 1 is the largest that is feasible. The gap sums
the Fenchel–Young terms instead of P(M) + ½⟨N R, N⟩, which would cancel:

    gap = Σ_g (⟨G_g, M_g⟩ + lam w_g ‖M_g‖) + (1 − s)⟨(B − M) R, M⟩ + ½ (1 − s)² ⟨(B − M) R, B − M⟩
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pysolve.correlations import Array, group_columns, group_norms
from pysolve.solve.problem import (
    Matrices,
    Problem,
    Problems,
    answers_of,
    check_lam,
    problem_of,
    takes_problem,
)


@dataclass(frozen=True)
class Certificate:
    """objective P(M); gap ≥ P(M) − min P; relative_gap = gap/|P(M)|; kkt: largest violation of optimality.

    kkt is max_g of ‖G_g + lam w_g M_g/‖M_g‖‖ on non-zero groups and (‖G_g‖ − lam w_g)₊ on zero ones.
    """

    objective: float
    gap: float
    relative_gap: float
    kkt: float


@takes_problem
def lam_max(
    problem: Problems, *, group_size: int | None = None, weights: npt.ArrayLike | None = None
) -> float:
    """The smallest lam whose solution is zero on every penalised group: max_g ‖C_g‖/w_g.

    C is taken after the unpenalised groups have been fitted.

    Parameters
    ----------
    problem, group_size, weights
        As in ``solve_linear_reconstruction``.

    Raises
    ------
    ValueError, TypeError
        For input that is no such problem.
    """
    problem = problem_of(problem, group_size, weights)
    penalised = problem.penalised
    if not penalised.any():
        return 0.0
    zero = [np.zeros_like(c) for c in problem.yx]
    _, gradients, _ = _fit_unpenalised(problem, zero)
    return float((group_norms(gradients, problem.group_size)[penalised] / problem.weights[penalised]).max())


@takes_problem
def certify(
    problem: Problems,
    M: npt.ArrayLike | Matrices,
    lam: float,
    *,
    group_size: int | None = None,
    weights: npt.ArrayLike | None = None,
) -> Certificate:
    """Objective, duality gap and optimality residual of any matrix M.

    Cost: one eigendecomposition of each r_xx.

    Parameters
    ----------
    problem, lam, group_size, weights
        As in ``solve_linear_reconstruction``.
    M : (h, d) array or CPU tensor
        Or a list or tuple of one for each of several readers.

    Raises
    ------
    ValueError, TypeError
        For input that is no such problem, or an M of another shape.
    """
    problem, lam = problem_of(problem, group_size, weights), check_lam(lam)
    answers = answers_of("M", M, problem)
    objective, gap = _objective(problem, answers, lam), _gap(problem, answers, lam)
    relative = 0.0 if gap == 0.0 else gap / abs(objective) if objective else float("inf")
    return Certificate(objective, gap, relative, _kkt(problem, answers, lam))


def _objective(problem: Problem, M: Sequence[Array], lam: float) -> float:
    smooth = sum(
        0.5 * np.vdot(m @ r, m) - np.vdot(c, m) for m, r, c in zip(M, problem.xx, problem.yx, strict=True)
    )
    return float(smooth + lam * problem.weights @ group_norms(M, problem.group_size))


def _gap(problem: Problem, M: Sequence[Array], lam: float) -> float:
    # The dual asks (N R − C)_u = 0 of an unpenalised group: refit those first, and charge what that gains.
    M, G, gained = _fit_unpenalised(problem, M)
    fits = zip(*map(_least_squares, problem.xx, problem.yx), strict=True)
    return max(min(_bound(problem, M, G, B, lam) for B in fits), 0.0) + gained


def _bound(problem: Problem, M: Sequence[Array], G: Sequence[Array], B: Sequence[Array], lam: float) -> float:
    """The gap formula for one choice of B."""
    penalised, thresholds = problem.penalised, lam * problem.weights
    targets = [b @ r for b, r in zip(B, problem.xx, strict=True)]
    E = [t - c for t, c in zip(targets, problem.yx, strict=True)]
    squares = [_inner(G, G, problem), _inner(G, E, problem), _inner(E, E, problem), thresholds]
    s = min((_largest_step(*row) for row in np.stack(squares, axis=1)[penalised]), default=1.0)
    if s < 0:
        return float("inf")
    young = _inner(G, M, problem) + thresholds * group_norms(M, problem.group_size)
    away = [t - m @ r for t, m, r in zip(targets, M, problem.xx, strict=True)]  # (B − M) R
    slope = sum(np.vdot(a, m) for a, m in zip(away, M, strict=True))
    bend = sum(np.vdot(a, b - m) for a, b, m in zip(away, B, M, strict=True))
    return float(young[penalised].sum() + (1 - s) * slope + 0.5 * (1 - s) ** 2 * max(bend, 0.0))


def _largest_step(gg: float, ge: float, ee: float, threshold: float) -> float:
    """Largest s in [0, 1] with ‖s G + (1 − s) E‖ ≤ threshold, −1 when not even s = 0 will do."""
    if gg <= threshold**2:
        return 1.0
    if ee > threshold**2:
        return -1.0
    # ‖E + s (G − E)‖² = threshold² has exactly one root in [0, 1]: below at s = 0, above at s = 1.
    a, b, c = gg - 2 * ge + ee, ge - ee, ee - threshold**2
    return float(np.clip(-c / (b + np.sqrt(b * b - a * c)), 0.0, 1.0))


def _kkt(problem: Problem, M: Sequence[Array], lam: float) -> float:
    size = problem.group_size
    thresholds, norms = lam * problem.weights, group_norms(M, size)
    shrinkage = np.repeat(np.divide(thresholds, norms, out=np.zeros_like(norms), where=norms > 0), size)
    gradients = [m @ r - c + shrinkage * m for m, r, c in zip(M, problem.xx, problem.yx, strict=True)]
    residuals = group_norms(gradients, size)
    return float(np.where(norms > 0, residuals, np.maximum(residuals - thresholds, 0.0)).max())


def _fit_unpenalised(problem: Problem, M: Sequence[Array]) -> tuple[list[Array], list[Array], float]:
    """M with its unpenalised columns refitted, its gradient G, and by how much that lowers P."""
    u = group_columns(np.flatnonzero(~problem.penalised), problem.group_size)
    refitted, gradients, gained = [], [], 0.0
    for m, r, c in zip(M, problem.xx, problem.yx, strict=True):
        g = m @ r - c
        if len(u):
            step = _least_squares(r[np.ix_(u, u)], g[:, u])[1]
            gained += 0.5 * float(np.vdot(step, g[:, u]))
            m, g = m.copy(), g - step @ r[u]
            m[:, u] -= step
        refitted.append(m)
        gradients.append(g)
    return refitted, gradients, gained


def _least_squares(R: Array, C: Array) -> list[Array]:
    """Several B with B R ≈ C, by how many eigenvectors of R (at unit diagonal) are taken for rounding.

    Which of them is best depends on how C was rounded; every one of them gives a valid bound.
    """
    unit = np.sqrt(np.where(np.diag(R) > 0, np.diag(R), 1.0))
    values, vectors = np.linalg.eigh(R / unit / unit[:, None])
    fits = []
    for cutoff in (1e-15, 1e-13, 1e-10):
        sound = values > cutoff * len(R) * max(values[-1], 0.0)
        kept = vectors[:, sound]
        fits.append(np.asarray(((C / unit) @ kept / values[sound]) @ kept.T / unit))
    return fits


def _inner(A: Sequence[Array], B: Sequence[Array], problem: Problem) -> Array:
    """⟨A_g, B_g⟩ of every group over all readers."""
    columns = sum(np.einsum("ij,ij->j", a, b) for a, b in zip(A, B, strict=True))
    return np.asarray(np.reshape(columns, (-1, problem.group_size)).sum(1))
