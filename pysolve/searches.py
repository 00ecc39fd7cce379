"""Ways to find which weights of a layer stay: alternating directions, elimination, a sweep of the columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pysolve.correlations import Array
from pysolve.masks import Mask, parse_pattern
from pysolve.row_paths import rows_left
from pysolve.supports import LayerProblem, blocks

Project = Callable[[npt.NDArray[Any]], Mask]

# Penalties ρ of ADMM, in inputs of unit variance, and schedules (penalties, iterations at each) with the
# multiplications of an iteration up to which each is taken: the longest that 10 to 60 s allow.
_RHO = (0.05, 1.0)
_SCHEDULES = ((10, 10, 1e10), (5, 4, 5e10), (3, 5, np.inf))
# Multiplications of an iteration beyond which even the shortest schedule is for the patient.
LARGEST = 4e11
# Blocks of columns in a sweep.
_BLOCKS = 32


def admm(
    problem: LayerProblem, left: int, project: Project, pattern: str | None = None
) -> tuple[Mask, Array]:
    """Alternating directions on M = Z, Z with its zeros; mask and Z.

    M ← (B + ρ (Z − U)) (A + ρ I)⁻¹,  Z ← the projection of M + U,  U ← U + M − Z, for rising ρ. In single
    precision: only the mask needs to be right.
    """
    h, d = problem.W.shape
    stages, each, _ = next(schedule for schedule in _SCHEDULES if 2.0 * h * d * d <= schedule[2])
    A = problem.metric()
    B = problem.target(A)
    peak = float(np.abs(B).max(initial=0.0)) or 1.0
    B = (B / peak).astype(np.float32)
    Z = (problem.W * (problem.unit / peak)).astype(np.float32)
    U, last = np.zeros_like(Z), _RHO[0]
    for rho in np.geomspace(*_RHO, stages):
        inverse = _inverse(A, rho).astype(np.float32)
        U *= np.float32(last / rho)
        last = rho
        for _ in range(each):
            Z -= U
            Z *= np.float32(rho)
            Z += B
            U += Z @ inverse
            mask = project(np.abs(U))
            Z = np.where(mask, U, np.float32(0))
            U -= Z
    return mask, Z * (peak / problem.unit)


def greedy(
    problem: LayerProblem, left: int, project: Project | None = None, pattern: str | None = None
) -> tuple[Mask, Array]:
    """Exact elimination in every row, and the sizes of the rows of least total error."""
    return rows_left(problem, left), problem.W


def sweep(
    problem: LayerProblem, left: int, project: Project, pattern: str | None = None
) -> tuple[Mask, Array]:
    """Columns one after the other: what goes from a column is made up for by all columns after it.

    With Uᵀ U = A⁻¹, U upper triangular, losing m_j costs ½ m_j² / U_jj² and changes the columns k > j by
    −m_j U_jk / U_jj. Which weights go is decided for a block of columns at a time, among all weights that are
    still to come. Columns of small ‖W_j‖² R_jj go first, for those that follow make up for them: half to two
    thirds of the error that the columns' own order leaves.

    Holds two (h, d) and (d, d) matrices, three at times, and an eighth for the mask.
    """
    d = problem.W.shape[1]
    group = parse_pattern(pattern)[1] if pattern else 1
    M = problem.optimum()
    order = _ascending(np.square(M).sum(0), group)
    M, U = M[:, order], _factor_of_inverse(problem.metric(order=order[::-1]))
    # A column's scores stay what they were when it was decided, out of reach of the others.
    scores = np.empty(M.shape, np.float32)
    peak = float(np.abs(M).max(initial=0.0)) or 1.0
    width = max(1, -(-d // (_BLOCKS * group))) * group
    mask = np.ones(M.shape, bool)
    for a in range(0, d, width):
        b = min(a + width, d)
        scores[:, a:] = np.abs(M[:, a:]) / (np.diag(U)[a:] * peak)
        mask[:, a:b] = project(scores)[:, a:b]
        scores[:, a:b] = np.where(mask[:, a:b], np.inf, -1.0)
        _clear(M, U, mask, slice(a, b))
    back = np.argsort(order)
    M, mask = M[:, back], mask[:, back]
    M /= problem.unit
    return mask, M


def _clear(M: Array, U: Array, mask: Mask, block: slice) -> None:
    """Take what ``mask`` drops out of a block of columns, and make up for it in all columns from there on."""
    a, b = block.start, block.stop
    inner, losses = np.ascontiguousarray(U[block, block]), np.empty((len(M), b - a))
    part = np.ascontiguousarray(M[:, block])
    for j in range(b - a):
        losses[:, j] = np.where(mask[:, a + j], 0.0, part[:, j] / inner[j, j])
        part[:, j:] -= losses[:, [j]] * inner[j, j:]
    M[:, block] = np.where(mask[:, block], part, 0.0)
    for rows in blocks(len(M)):
        M[rows, b:] -= losses[rows] @ U[block, b:]


def _ascending(energy: Array, group: int) -> npt.NDArray[np.intp]:
    """Columns by energy, in whole groups of consecutive ones; an incomplete group comes last."""
    whole = len(energy) // group
    first = np.argsort(energy[: whole * group].reshape(whole, group).sum(1), kind="stable")
    columns = (first[:, None] * group + np.arange(group)).ravel()
    return np.concatenate([columns, np.arange(whole * group, len(energy))])


def _factor_of_inverse(reversed_metric: Array) -> Array:
    """The upper triangular U with Uᵀ U = A⁻¹, from A with rows and columns in reverse order, in its place.

    With A reversed = L Lᵀ, U is L⁻¹ reversed: nothing is inverted twice.
    """
    # Symmetric, so the transpose is the same matrix in the order of LAPACK.
    factor = scipy.linalg.cholesky(reversed_metric.T, lower=True, overwrite_a=True, check_finite=False)
    inverse, _ = scipy.linalg.lapack.dtrtri(factor, lower=1, overwrite_c=1)
    return np.asarray(inverse[::-1, ::-1])


def _inverse(A: Array, rho: float) -> Array:
    """(A + ρ I)⁻¹"""
    inverse = A.copy()
    inverse.ravel()[:: len(A) + 1] += rho
    factor, _ = scipy.linalg.lapack.dpotrf(inverse.T, lower=1, overwrite_a=1)
    factor, _ = scipy.linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
    full = np.tril(factor, -1)
    full += full.T
    np.fill_diagonal(full, np.diag(factor))
    return np.asarray(full)
