"""The best table of low rank: rows that are looked up so often, and read by heads that share them.

    min_{A, B}  Σ_v (E_v − A_v B) (n_v S + R) (E_v − A_v B)ᵀ

E (V, D) is the table, n_v how often row v is looked up, S the weight of errors at what is looked up, and
R = Σ x xᵀ over the inputs of the linear layers whose weight the table is as well. Without such layers, or
where nothing is looked up, one eigenvalue decomposition solves it for every rank:

    A = E S^½ P,  B = Pᵀ S^−½,  P the leading eigenvectors of S^½ Eᵀ diag(n) E S^½.

Of both together no decomposition is known. There the best factors for one metric in all rows are the start,
and A and B are solved for in turn, each exactly: rows of A by the eigenvectors of the pencil
(B S Bᵀ, B R Bᵀ); B, from  Aᵀ diag(n) A B S + Aᵀ A B R = Aᵀ diag(n) E S + Aᵀ E R , by those of (S, R) and of
(Aᵀ diag(n) A, Aᵀ A).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from pysolve.correlations import Array, Indices
from pysolve.layer.spectrum import balanced
from pysolve.solve.lapack import eigh

# Rounds of solving for A and B in turn; they end where one gains less than this share of what is lost. With
# 1e-3 one in two thousand small tables stayed at a saddle, where a tenth less could be lost.
_ROUNDS, _GAIN = 100, 1e-5
# Share of the mean eigenvalue that is added to all.
_RIDGE = 1e-7


@dataclass(frozen=True, eq=False)
class Uses:
    """How a table is used.

    Parameters
    ----------
    counts : (V,) array
        How often each row is looked up.
    metric : (D, D) array
        S, what errors of a row that is looked up mean.
    moments : (D, D) array, optional
        R, of what the layers read that share the table; None where there are none.
    """

    counts: Array
    metric: Array
    moments: Array | None = None

    def of(self, rows: Indices, columns: Indices) -> Uses:
        """Of some rows and columns alone."""
        square = np.ix_(columns, columns)
        moments = None if self.moments is None else self.moments[square]
        return Uses(self.counts[rows], self.metric[square], moments)

    def turned(self, T: Array) -> Uses:
        """Of rows v where these are T v, with an orthogonal T."""
        moments = None if self.moments is None else T.T @ self.moments @ T
        return Uses(self.counts, T.T @ self.metric @ T, moments)


@dataclass(frozen=True, eq=False)
class DecomposedTable:
    """A table that was decomposed once, for its factors of every rank.

    Parameters
    ----------
    table : (V, D) array
    uses : Uses
    directions : (D, D) array
        P, the most important first.
    root : (D, D) array
        S^½, of the metric that all rows have in common.
    energies : (D,) array
        What each direction holds of the objective.
    """

    table: Array
    uses: Uses
    directions: Array
    root: Array
    energies: Array

    @property
    def tails(self) -> Array:
        """(D + 1,) share of the objective that is lost at rank 0 … D; with layers that share it, about."""
        total = float(self.energies.sum())
        if total <= 0:
            return np.zeros(len(self.energies) + 1)
        lost = 1 - np.concatenate([[0.0], np.cumsum(self.energies)]) / total
        return np.minimum.accumulate(np.maximum(lost, 0.0))

    def factors(self, rank: int) -> tuple[Array, Array]:
        """A (V, r) and B (r, D) for a rank."""
        P = self.directions[:, :rank]
        A = self.table @ (self.root @ P)
        B = scipy.linalg.solve(self.root, P, assume_a="sym", check_finite=False).T
        if self.uses.moments is not None and self.uses.counts.any():
            A, B = _in_turn(self.table, self.uses, A, B)
        found = balanced(A, B)
        return found.outer, found.inner


def decompose_table(table: Array, uses: Uses) -> DecomposedTable:
    """Decompose a table for all ranks."""
    counts, S, R = uses.counts, _definite(uses.metric), uses.moments
    # What all rows have in common, and how much each counts.
    weights = counts if R is None else np.ones(len(table))
    common = S if R is None else _definite(counts.mean() * S + R)
    values, vectors = eigh(common)
    root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    inner = root @ (table.T @ (weights[:, None] * table)) @ root
    energies, directions = eigh((inner + inner.T) / 2)
    return DecomposedTable(table, uses, directions[:, ::-1], root, np.maximum(energies[::-1], 0.0))


def table_loss(table: Array, other: Array, uses: Uses) -> float:
    """The objective of another table in its place."""
    off = table - other
    squares = np.einsum("ij,ij->i", off @ uses.metric, off) @ uses.counts
    return float(squares if uses.moments is None else squares + np.vdot(off @ uses.moments, off))


def _in_turn(E: Array, uses: Uses, A: Array, B: Array) -> tuple[Array, Array]:
    """Factors that are solved for in turn, until little is gained."""
    assert uses.moments is not None
    n, S, R = uses.counts[:, None], _definite(uses.metric), _definite(uses.moments)
    s, W = eigh(S, R)
    whole = before = table_loss(E, np.zeros_like(E), Uses(uses.counts, S, R))
    for _ in range(_ROUNDS):
        p, U = eigh(B @ S @ B.T, _definite(B @ R @ B.T))
        A = ((n * (E @ (S @ B.T)) + E @ (R @ B.T)) @ U / (n * p + 1)) @ U.T
        p, U = eigh(A.T @ (n * A), _definite(A.T @ A))
        right = (A.T @ (n * E)) @ S + (A.T @ E) @ R
        B = U @ ((U.T @ right @ W) / (1 + np.outer(p, s))) @ W.T
        # The objective where B is the best for A.
        lost = whole - float(np.vdot(right, B))
        if lost >= (1 - _GAIN) * before:
            break
        before = lost
    return A, B


def _definite(matrix: Array) -> Array:
    """A symmetric matrix with a little added to its diagonal."""
    ridge = _RIDGE * float(np.trace(matrix)) / len(matrix) or 1.0
    return np.asarray((matrix + matrix.T) / 2 + ridge * np.eye(len(matrix)))
