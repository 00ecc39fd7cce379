"""Searches for the weights of a layer to keep: alternating directions, elimination, a sweep of columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pysolve.correlations import AnyArray, Array, Indices, Mask
from pysolve.layer.layer_problem import LayerProblem, blocks
from pysolve.layer.masks import keep_in_rows, keep_largest, keep_pattern
from pysolve.layer.row_paths import rows_kept

# Penalties ρ of ADMM, in inputs of unit variance, and schedules (penalties, iterations at each) with the
# multiplications of an iteration up to which each is taken: the longest that 10 to 60 s allow.
_RHO = (0.05, 1.0)
_SCHEDULES = ((10, 10, 1e10), (5, 4, 5e10), (3, 5, np.inf))
# Multiplications of an iteration beyond which even the shortest schedule is for the patient.
LARGEST = 4e11
# Blocks of columns in a sweep.
_BLOCKS = 32


@dataclass(frozen=True)
class Zeros:
    """``kept`` weights in the layer or in every row; or a pattern, n of every m consecutive ones of a row."""

    kept: int
    by_row: bool = False
    pattern: tuple[int, int] | None = None

    def project(self, scores: AnyArray) -> Mask:
        """The mask of the largest scores that may be kept."""
        if self.pattern is not None:
            return keep_pattern(scores, *self.pattern)
        return (keep_in_rows if self.by_row else keep_largest)(scores, self.kept)


def admm(problem: LayerProblem, zeros: Zeros) -> tuple[Mask, Array]:
    """Alternating directions on M = Z, Z with its zeros; mask and Z.

    M ← (B + ρ (Z − U)) (A + ρ I)⁻¹,  Z ← the projection of M + U,  U ← U + M − Z, for rising ρ. In single
    precision, since only the mask needs to be right; holds four float64 matrices beside R and W.
    """
    h, d = problem.W.shape
    stages, each, _ = next(schedule for schedule in _SCHEDULES if 2.0 * h * d * d <= schedule[2])
    peak = float(np.abs(problem.W * problem.unit).max(initial=0.0))
    if problem.C is not None:
        # Weights next to nothing beside what the outputs want must not take B beyond single precision.
        peak = max(peak, 1e-20 * float(np.abs(problem.C / problem.unit)[:, ~problem.dead].max(initial=0.0)))
    peak = peak or 1.0
    Z = (problem.W * (problem.unit / peak)).astype(np.float32)
    B, U, last = _single_target(problem, peak), np.zeros_like(Z), _RHO[0]
    mask = np.ones(Z.shape, bool)
    for rho in np.geomspace(*_RHO, stages):
        inverse = _shifted_inverse(problem, rho)
        U *= np.float32(last / rho)
        last = rho
        for _ in range(each):
            Z -= U
            Z *= np.float32(rho)
            Z += B
            for rows in blocks(h):
                U[rows] += Z[rows] @ inverse
            mask = zeros.project(np.abs(U))
            np.multiply(U, mask, out=Z)
            U -= Z
    return mask, Z * (peak / problem.unit)


def greedy(problem: LayerProblem, zeros: Zeros) -> tuple[Mask, Array]:
    """Exact elimination in every row, and the sizes of the rows of least total error."""
    return rows_kept(problem, zeros.kept), problem.W


def sweep(problem: LayerProblem, zeros: Zeros) -> tuple[Mask, Array]:
    """Columns one after the other: all later columns compensate what is removed from a column.

    With Uᵀ U = A⁻¹, U upper triangular, losing m_j costs ½ m_j² / U_jj² and changes the columns k > j by
    −m_j U_jk / U_jj. Which weights are removed is decided for a block of columns at a time, among all weights
    still to come, and columns of small ‖W_j‖² R_jj come first, since later ones compensate them: at 90 %
    zeros that leaves 0.4 to 0.75 of the error of equal shares of all blocks in the columns' own order.

    Takes h d² + 2/3 d³ multiplications, and at most three float64 matrices beside R and W, the result among
    them.
    """
    d = problem.W.shape[1]
    group = zeros.pattern[1] if zeros.pattern else 1
    M = problem.optimum()
    # Scores are compared in single precision: bring them into its range, exactly.
    exponent = int(np.frexp(np.abs(M).max(initial=0.0))[1])
    np.ldexp(M, -exponent, out=M)
    order = _ascending(np.einsum("ij,ij->j", M, M), group)
    for rows in blocks(len(M)):
        M[rows] = M[rows][:, order]
    U = _factor_of_inverse(problem.metric(order[::-1]))
    width, mask = max(1, -(-d // (_BLOCKS * group))) * group, np.ones(M.shape, bool)
    for a in range(0, d, width):
        block = slice(a, min(a + width, d))
        _decide(M, np.diag(U), mask, block, zeros)
        _clear(M, U, mask, block)
    del U
    back = np.argsort(order)
    for rows in blocks(len(M)):
        M[rows], mask[rows] = M[rows][:, back] / problem.unit, mask[rows][:, back]
    return mask, np.ldexp(M, exponent, out=M)


def _decide(M: Array, scale: Array, mask: Mask, block: slice, zeros: Zeros) -> None:
    """Decide what a block of columns keeps, when the columns before it are decided, those after it not."""
    if zeros.pattern or zeros.by_row:
        for rows in blocks(len(M)):
            scores = np.abs(M[rows, : block.stop if zeros.pattern else None])
            scores /= scale[: scores.shape[1]]
            scores[:, : block.start] = np.where(mask[rows, : block.start], np.inf, -1.0)
            mask[rows, block] = zeros.project(scores)[:, block]
        return
    left = zeros.kept - np.count_nonzero(mask[:, : block.start])
    scores = np.empty((len(M), len(scale) - block.start), np.float32)
    for rows in blocks(len(M)):
        scores[rows] = np.abs(M[rows, block.start :]) / scale[block.start :]
    own = scores[:, : block.stop - block.start].copy()
    flat = scores.ravel()
    first = flat.size - left
    if left in (0, flat.size):
        mask[:, block] = left > 0
        return
    flat.partition(first)
    ties = left - np.count_nonzero(flat[first:] > flat[first])
    stay = own > flat[first]
    stay.ravel()[np.flatnonzero(own == flat[first])[:ties]] = True
    mask[:, block] = stay


def _clear(M: Array, U: Array, mask: Mask, block: slice) -> None:
    """Remove what ``mask`` drops from a block of columns, and compensate it in all columns from there on."""
    a, b = block.start, block.stop
    inner, losses = np.ascontiguousarray(U[block, block]), np.empty((len(M), b - a))
    part = np.ascontiguousarray(M[:, block])
    for j in range(b - a):
        losses[:, j] = np.where(mask[:, a + j], 0.0, part[:, j] / inner[j, j])
        part[:, j:] -= losses[:, [j]] * inner[j, j:]
    M[:, block] = np.where(mask[:, block], part, 0.0)
    after = np.ascontiguousarray(U[block, b:])
    for rows in blocks(len(M)):
        M[rows, b:] -= losses[rows] @ after


def _ascending(energy: Array, group: int) -> Indices:
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


def _single_target(problem: LayerProblem, peak: float) -> npt.NDArray[np.float32]:
    """B / peak."""
    A, B = problem.metric(), np.empty(problem.W.shape, np.float32)
    for rows in blocks(len(B)):
        B[rows] = problem.target(A, rows) / peak
    return B


def _shifted_inverse(problem: LayerProblem, rho: float) -> npt.NDArray[np.float32]:
    """(A + ρ I)⁻¹"""
    A = problem.metric()
    A.flat[:: len(A) + 1] += rho
    factor, _ = scipy.linalg.lapack.dpotrf(A.T, lower=1, overwrite_a=1)
    factor, _ = scipy.linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
    inverse = factor.astype(np.float32)
    for rows in blocks(len(A)):
        inverse[rows, rows.stop :] = inverse[rows.stop :, rows].T
        inverse[rows, rows] = np.tril(inverse[rows, rows]) + np.tril(inverse[rows, rows], -1).T
    return np.asarray(inverse)
