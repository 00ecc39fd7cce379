"""Distance of a matrix from the solution, by NumPy alone: judges every solver, shares no code with any.

For M (h × d), R = E[x xᵀ], C = E[y xᵀ] and G = M R − C:

    P(M) = ½⟨M R, M⟩ − ⟨C, M⟩ + lam Σ_g w_g ‖M_g‖_F

Every N with ‖(N R − C)_g‖ ≤ lam w_g for all g proves min P ≥ −½⟨N R, N⟩. Here N = s M + (1 − s) B, where B
solves least squares, B R = C + E (E is measured), and s ≤ 1 is the largest that is feasible. The gap sums
the Fenchel–Young terms instead of P(M) + ½⟨N R, N⟩, which would cancel:

    gap = Σ_g (⟨G_g, M_g⟩ + lam w_g ‖M_g‖) + (1 − s)⟨(B − M) R, M⟩ + ½ (1 − s)² ⟨(B − M) R, B − M⟩

Unpenalised columns u ask for (N R − C)_u = 0: those of M and B are refitted first. What rounding leaves
there, in a problem that may be nearly singular, is part of the gap.

Where rounding has left the given R indefinite, P has no minimum, and R is raised, R + diag(t). P is that of
the given R; the gap is that of the raised one plus ½ Σ_i t_i ‖M_i‖², by which the two differ at M. It bounds
P(M) − P(N) for all N with Σ_i t_i ‖N_i‖² up to twice that of M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pysolve.correlations import Array, Indices, group_columns, group_norms, product
from pysolve.solve.problem import (
    Matrices,
    Problem,
    Problems,
    Spectrum,
    answers_of,
    check_lam,
    problem_of,
    spectrum_of,
    takes_problem,
)
from pysolve.solve.scaling import scale

Inverse = Callable[[Array], Array]

EPS = float(np.finfo(np.float64).eps)
LARGEST_FLOAT = float(np.finfo(np.float64).max)
# Steps of an unpenalised fit; each leaves a share of eps / (smallest eigenvalue) of the one before.
REFINEMENTS = 4


@dataclass(frozen=True)
class Certificate:
    """objective P(M); gap ≥ P(M) − min P; relative_gap = gap/abs(P(M)); kkt: largest violation of optimality.

    ``shift`` is the largest amount by which the diagonal of an r_xx was raised, as in ``Solution``.

    kkt is max_g of ‖G_g + lam w_g M_g/‖M_g‖‖ on non-zero groups and (‖G_g‖ − lam w_g)₊ on zero ones.
    """

    objective: float
    gap: float
    relative_gap: float
    kkt: float
    shift: float = 0.0


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

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> ps.newton((r_xx, r_yx), 1.01 * ps.lam_max(r_xx, r_yx)).keep.size
    0
    """
    return scale(problem_of(problem, group_size, weights)).lam_max


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

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> ps.certify((r_xx, r_yx), ps.debias(r_xx, r_yx, range(5)), lam=1e-3).relative_gap < 0.01
    True
    """
    problem, lam = problem_of(problem, group_size, weights), check_lam(lam)
    answers = answers_of("M", M, problem)
    return certificate_of(problem, answers, lam)


def certificate_of(problem: Problem, M: Sequence[Array], lam: float) -> Certificate:
    """``certify`` on checked input."""
    lift = lift_of(problem, M)
    objective, gap = _objective(problem, M, lam) - lift, _gap(problem, M, lam) + lift
    return Certificate(objective, gap, relative(gap, objective), _kkt(problem, M, lam), shift_of(problem))


def relative(gap: float, objective: float) -> float:
    """gap/|objective|, a number wherever the gap is one."""
    if gap == 0 or np.isinf(gap):
        return gap
    return min(gap / abs(objective), LARGEST_FLOAT) if objective else LARGEST_FLOAT


def lift_of(problem: Problem, M: Sequence[Array]) -> float:
    """½ Σ_i t_i ‖M_i‖² for the amounts t by which the diagonals were raised: P of the raised R less P."""
    return 0.5 * sum(float(np.square(m).sum(0) @ t) for m, t in zip(M, problem.lifts, strict=True))


def shift_of(problem: Problem) -> float:
    """The largest amount by which a diagonal was raised, or that R_uu would need to be surely definite."""
    shift, u = max(float(t.max()) for t in problem.lifts), _unpenalised(problem)
    for R in problem.xx if len(u) else ():
        unit, values, _ = spectrum_of(R[np.ix_(u, u)])
        rounding = 2 * EPS * len(u) * float(values[-1])
        if values[0] < rounding:
            shift = max(shift, rounding * float(np.square(unit).max()))
    return shift


def _objective(problem: Problem, M: Sequence[Array], lam: float) -> float:
    smooth = sum(
        0.5 * np.vdot(product(m, r), m) - np.vdot(c, m)
        for m, r, c in zip(M, problem.xx, problem.yx, strict=True)
    )
    return float(smooth + lam * problem.weights @ group_norms(M, problem.group_size))


def _gap(problem: Problem, M: Sequence[Array], lam: float) -> float:
    # The dual asks (N R − C)_u = 0 of an unpenalised group: refit those first, and charge what that gains.
    M, G, gained = _fit_unpenalised(problem, M)
    # Which B is best depends on how C was rounded; every one of them gives a valid bound.
    bounds = [_bound(problem, M, G, lam, cutoff) for cutoff in (1e-15, 1e-13, 1e-10)]
    return max(min(bounds), 0.0) + gained


def _bound(problem: Problem, M: Sequence[Array], G: Sequence[Array], lam: float, cutoff: float) -> float:
    """The gap formula for one choice of B."""
    penalised, thresholds, size = problem.penalised, lam * problem.weights, problem.group_size
    inverses = [_inverse(spectrum, cutoff) for spectrum in problem.spectra]
    B = [inverse(c) for inverse, c in zip(inverses, problem.yx, strict=True)]
    for b, r, c, inverse in zip(B, problem.xx, problem.yx, inverses, strict=True):
        b += inverse(c - product(b, r))
    B, E, _ = _fit_unpenalised(problem, B)
    young = _inner(G, M, problem) + thresholds * group_norms(M, size)
    away = [e - g for e, g in zip(E, G, strict=True)]  # (B − M) R
    D = [b - m for b, m in zip(B, M, strict=True)]
    # Products with (B − M) R and G on unpenalised columns, both zero but for rounding, cancel.
    slope = _inner(away, M, problem)[penalised].sum() - _inner(G, D, problem)[~penalised].sum()
    bend = _inner(away, D, problem)
    # R may be indefinite by rounding, which counts where B is large.
    reach = sum(float(np.square(d * unit).sum()) for d, (unit, _, _) in zip(D, problem.spectra, strict=True))
    doubt = EPS * problem.inputs * reach
    square = 0.5 * (max(bend.sum(), 0.0) + doubt) - bend[~penalised].sum()
    lowest = float("inf")
    for cost, spill in _rounding(problem, M, G, E):
        room = thresholds - spill
        if np.any(room[penalised] <= 0):
            continue
        squares = [_inner(G, G, problem), _inner(G, E, problem), _inner(E, E, problem), room]
        s = min((_largest_step(*row) for row in np.stack(squares, axis=1)[penalised]), default=1.0)
        if s < 0:
            continue
        N = [s * np.abs(m) + (1 - s) * np.abs(b) for m, b in zip(M, B, strict=True)]
        gap = young[penalised].sum() + (1 - s) * slope + (1 - s) ** 2 * square
        lowest = min(lowest, float(gap + cost + spill @ group_norms(N, size)))
    return lowest


def _rounding(
    problem: Problem, M: Sequence[Array], G: Sequence[Array], E: Sequence[Array]
) -> list[tuple[float, Array]]:
    """What F, the rounding left of (N R − C)_u, costs: of P, and in ‖(N R − C)_g‖ of each penalised group.

    Either ½⟨F R⁻¹, F⟩, as P could gain from F, or ½⟨F R_uu⁻¹, F⟩ and ‖(F R_uu⁻¹ R_u·)_g‖, for N less F R_uu⁻¹
    is feasible on u and moves the others. Large M that cancel leave rounding in all of N R − C: it is added.
    """
    u, groups = _unpenalised(problem), problem.groups
    if not len(u):
        return [(0.0, np.zeros(groups))]
    noise = [
        2 * EPS * (np.sqrt(product(np.square(m), np.square(r))) + np.abs(c))
        for m, r, c in zip(M, problem.xx, problem.yx, strict=True)
    ]
    left = [np.abs(g[:, u]) + np.abs(e[:, u]) + n[:, u] for g, e, n in zip(G, E, noise, strict=True)]
    ways = []
    for whole in (True, False):
        cost, spill = 0.0, []
        for f, n, r, spectrum in zip(left, noise, problem.xx, problem.spectra, strict=True):
            unit, values, vectors = spectrum if whole else spectrum_of(r[np.ix_(u, u)])
            if whole:
                unit, vectors = unit[u], vectors[u]
            # A curvature within rounding of zero may be next to none.
            least = np.maximum(values - 2 * EPS * len(values) * max(values[-1], 1.0), 1e-3 * EPS)
            along = np.sqrt(np.square(f / unit) @ np.square(vectors))
            cost += 0.5 * float((np.square(along) / least).sum())
            spill.append(n if whole else n + (along / least) @ np.abs((r[:, u] / unit @ vectors).T))
        norms = group_norms(spill, problem.group_size)
        ways.append((cost, np.where(problem.penalised, norms, 0.0)))
    return ways


def _unpenalised(problem: Problem) -> Indices:
    """Columns of the unpenalised groups."""
    return group_columns(np.flatnonzero(~problem.penalised), problem.group_size)


def _largest_step(gg: float, ge: float, ee: float, threshold: float) -> float:
    """Largest s in [0, 1] with ‖s G + (1 − s) E‖ ≤ threshold, −1 when not even s = 0 will do."""
    if gg <= threshold**2:
        return 1.0
    if ee > threshold**2:
        return -1.0
    # ‖E + s (G − E)‖² = threshold² has exactly one root in [0, 1]: below at s = 0, above at s = 1. Each of
    # the two formulas cancels where the other one does not; where G is E but for rounding, there is no step.
    a, b, c = gg - 2 * ge + ee, ge - ee, ee - threshold**2
    root = np.sqrt(max(b * b - a * c, 0.0))
    over, under = (root - b, a) if b < 0 else (-c, b + root)
    return float(np.clip(over / under, 0.0, 1.0)) if under > 0 else 0.0


def _kkt(problem: Problem, M: Sequence[Array], lam: float) -> float:
    size = problem.group_size
    thresholds, norms = lam * problem.weights, group_norms(M, size)
    pull, length = np.repeat(thresholds, size), np.repeat(np.where(norms > 0, norms, 1.0), size)
    gradients = [
        product(m, r) - c + pull * (m / length) for m, r, c in zip(M, problem.xx, problem.yx, strict=True)
    ]
    residuals = group_norms(gradients, size)
    return float(np.where(norms > 0, residuals, np.maximum(residuals - thresholds, 0.0)).max())


def _fit_unpenalised(problem: Problem, M: Sequence[Array]) -> tuple[list[Array], list[Array], float]:
    """M with its unpenalised columns refitted, its gradient G, and by how much that lowers P."""
    u = _unpenalised(problem)
    refitted, gradients, gained = [], [], 0.0
    for m, r, c in zip(M, problem.xx, problem.yx, strict=True):
        g = product(m, r) - c
        if len(u):
            m, own = m.copy(), r[np.ix_(u, u)]
            inverse = _inverse(spectrum_of(own), 1e-15)
            # Where R_uu is nearly singular, one step leaves much of what its rounding does.
            for _ in range(REFINEMENTS):
                step = inverse(g[:, u])
                gain = float(np.vdot(step, g[:, u]) - 0.5 * np.vdot(step @ own, step))
                if gain <= 0:
                    break
                m[:, u] -= step
                g, gained = product(m, r) - c, gained + gain
        refitted.append(m)
        gradients.append(g)
    return refitted, gradients, gained


def _inverse(spectrum: Spectrum, cutoff: float) -> Inverse:
    """V ↦ V R⁺, without the eigenvalues of R at unit diagonal below ``cutoff`` · d times the largest."""
    unit, values, vectors = spectrum
    sound = values > cutoff * len(values) * max(values[-1], 0.0)
    kept, found = vectors[:, sound], values[sound]
    return lambda V: product(product(V / unit, kept) / found, kept.T) / unit


def _inner(A: Sequence[Array], B: Sequence[Array], problem: Problem) -> Array:
    """⟨A_g, B_g⟩ of every group over all readers."""
    columns = sum(np.einsum("ij,ij->j", a, b) for a, b in zip(A, B, strict=True))
    return np.asarray(np.reshape(columns, (-1, problem.group_size)).sum(1))
