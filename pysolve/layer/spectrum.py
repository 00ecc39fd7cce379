"""The best approximation of a layer at every rank, by one decomposition.

    min_{M of rank r}  ½ E‖y − M x‖² + ½ ε Σ_j R_jj ‖M_j − W_j‖²

With G = R + ε diag(R) and B the minimum without a bound on the rank, the objective of any M exceeds it by
½ tr((M − B) G (M − B)ᵀ). So M = P Pᵀ B, where the columns of P are the r leading eigenvectors of B G Bᵀ, is
the exact solution, and the other eigenvalues are its cost. Nothing is inverted: G may be singular. With
G = I and B = W this is the truncated singular value decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import eigsh

from pysolve.correlations import Array, Correlations, gram, product
from pysolve.forms import LowRank
from pysolve.solve.lapack import eigh
from pysolve.solve.least_squares import prior_ridge, pull, refit

# From so many rows on, and up to this share of them, a few eigenvectors are cheaper by Lanczos. A randomised
# decomposition (torch.svd_lowrank) takes less than half the time from 2,048 rows on, at 3 % more error.
_LARGE, _FEW = 1024, 1 / 32


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A matrix B (h, d) and the directions of its outputs, those with most energy first.

    ``directions`` (h, q) are orthonormal eigenvectors of B G Bᵀ, ``energies`` (q,) their eigenvalues,
    falling; ``total`` is the sum of all eigenvalues, those that are not among the q too.
    """

    matrix: Array
    directions: Array
    energies: Array
    total: float

    @property
    def tails(self) -> Array:
        """(q + 1,) lost share of the energy at rank 0 … q; never rises."""
        if self.total <= 0:
            return np.zeros(len(self.energies) + 1)
        lost = 1 - np.concatenate([[0.0], np.cumsum(self.energies)]) / self.total
        return np.minimum.accumulate(np.maximum(lost, 0.0))

    def factors(self, rank: int) -> LowRank:
        """outer (h, rank) and inner (rank, d), columns and rows of equal norms, whose product is P Pᵀ B."""
        P = self.directions[:, :rank]
        return balanced(P, P.T @ self.matrix)


def plain_spectrum(W: Array, rank: int | None = None) -> Spectrum:
    """Spectrum of a matrix W (h, d) by itself; ``rank``, the largest needed, saves time on large ones."""
    return _spectrum(np.asarray(W, dtype=np.float64), None, rank)


def activation_spectrum(W: Array, correlations: Correlations, rank: int | None = None) -> Spectrum:
    """Spectrum of a layer on its inputs: reduced-rank regression with a ridge towards its weights W (h, d).

    The correlations, of its inputs with the outputs wanted, are centred here, for the bias is free.

    References
    ----------
    A. J. Izenman, Reduced-rank regression for the multivariate linear model, 1975.
    """
    d = len(correlations.xx)
    ridge = prior_ridge(d, correlations.count)
    B, *_ = refit(correlations, np.arange(d), W, ridge=ridge)
    R = correlations.centered().r_xx
    return _spectrum(B, R + ridge * np.diag(pull(np.diag(R))), rank)


def balanced(outer: Array, inner: Array) -> LowRank:
    """Factors with the same product, each column of one as large as the row of the other."""
    sizes = np.linalg.norm(inner, axis=1), np.linalg.norm(outer, axis=0)
    ratio = np.sqrt(np.divide(*sizes, out=np.ones(len(inner)), where=(sizes[0] > 0) & (sizes[1] > 0)))
    return LowRank(outer * ratio, inner / ratio[:, None])


def _spectrum(B: Array, G: Array | None, rank: int | None) -> Spectrum:
    h, d = B.shape
    # Of a tall matrix, the directions lie in the space of its columns.
    Q, T = scipy.linalg.qr(B, mode="economic", check_finite=False) if h > d else (None, B)
    S = gram(T.T) if G is None else product(product(T, G), T.T)
    energies, directions = _leading((S + S.T) / 2, min(h, d) if rank is None else min(rank, h, d))
    directions = directions if Q is None else product(Q, directions)
    return Spectrum(B, directions, np.maximum(energies, 0.0), float(np.trace(S)))


def _leading(S: Array, k: int) -> tuple[Array, Array]:
    """The k largest eigenvalues, falling, and their eigenvectors."""
    n = len(S)
    # Lanczos cannot start where all is zero.
    if n >= _LARGE and k <= _FEW * n and S.any():
        values, vectors = eigsh(S, k=k, v0=np.random.default_rng(0).standard_normal(n))
    else:
        values, vectors = (found[..., n - k :] for found in eigh(S))
    order = np.argsort(-values, kind="stable")
    return values[order], vectors[:, order]
