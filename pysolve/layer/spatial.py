"""A convolution factored into one along its height and one along its width.

    W[h, c, i, j] = Σ_k outer[h, k, j] inner[k, c, i]

Taken as an (h·j) × (c·i) matrix W is to have rank r. The error of the outputs couples the columns j of the
window, so no single decomposition solves it. The columns' mean correlations give inner by
reduced rank; then each of the two factors is refitted by least squares with the other one held, exactly, for
a few rounds that never raise the error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator, cg

from pysolve.correlations import Array, Correlations
from pysolve.forms import LowRank
from pysolve.layer.spectrum import Spectrum, activation_spectrum, plain_spectrum
from pysolve.solve.least_squares import prior_ridge

Kernel = tuple[int, int]
# Refits of both factors, and steps of conjugate gradients for one.
ROUNDS, STEPS = 3, 30
# Multiplications of a step beyond which the inner factor stays as it starts: seconds a step on one thread.
_HEAVY = 3e9


def unfolded(W: Array, kernel: Kernel) -> Array:
    """(h, c·i·j) as (h·j, c·i)."""
    i, j = kernel
    h = len(W)
    return W.reshape(h, -1, i, j).transpose(0, 3, 1, 2).reshape(h * j, -1)


def as_kernels(form: LowRank, kernel: Kernel) -> LowRank:
    """Factors (h·j, r) and (r, c·i) as the weights of two convolutions."""
    i, j = kernel
    r = form.rank
    outer = form.outer.reshape(-1, j, r).transpose(0, 2, 1).reshape(-1, r, 1, j)
    return LowRank(outer, form.inner.reshape(r, -1, i, 1))


def plain_spatial(W: Array, kernel: Kernel) -> Spectrum:
    """Spectrum of the unfolded weight alone."""
    return plain_spectrum(unfolded(W, kernel))


def spatial_spectrum(W: Array, correlations: Correlations, kernel: Kernel) -> Spectrum:
    """Spectrum for the columns' mean correlations, as if the inputs of the columns were unrelated."""
    i, j = kernel
    own = correlations.centered()
    c = len(own.xx) // (i * j)
    xx = np.einsum("aijbkj->aibk", own.xx.reshape(c, i, j, c, i, j), optimize=True).reshape(c * i, c * i)
    A = unfolded(W, kernel)
    zero = np.zeros(len(xx)), np.zeros(len(A))
    columns = Correlations(xx, A @ xx, A @ xx @ A.T, correlations.count * j, *zero)
    return activation_spectrum(A, columns)


def better_start(starts: Sequence[LowRank], W: Array, correlations: Correlations, kernel: Kernel) -> LowRank:
    """Which of several factors (h·j, r) and (r, c·i) to refit: those of the least error."""
    own = correlations.centered()
    ridge = prior_ridge(len(own.xx), own.count) * np.diag(own.r_xx)

    def error(form: LowRank) -> float:
        M = as_kernels(form, kernel).dense().reshape(W.shape)
        return own.error(M) + 0.5 * float(np.square(M - W).sum(0) @ ridge)

    return min(starts, key=error)


def refitted(form: LowRank, W: Array, correlations: Correlations, kernel: Kernel) -> LowRank:
    """Factors (h·j, r) and (r, c·i) fitted in turn to the outputs wanted.

    Minimises the objective of ``activation_spectrum`` over one factor with the other one held.
    """
    i, j = kernel
    h, own = len(W), correlations.centered()
    ridge = prior_ridge(len(own.xx), own.count) * np.diag(own.r_xx)
    size = len(own.xx) // j
    # (j, ci, m, ci) and (j, h, ci): one block a pair of columns of the window.
    order = (2, 0, 1, 5, 3, 4)
    R = (own.r_xx + np.diag(ridge)).reshape(size // i, i, j, size // i, i, j).transpose(order)
    R = np.ascontiguousarray(R.reshape(j, size, j, size))
    C = (own.r_yx + ridge * W).reshape(h, size // i, i, j).transpose(3, 0, 1, 2).reshape(j, h, size)
    outer, inner = form.outer, form.inner
    heavy = inner.size * size * j * j > _HEAVY
    for step in range(1 if heavy else ROUNDS):
        if step:
            inner = _fitted_inner(_columns(outer, j), inner, R, C)
        outer = _fitted_outer(inner, R, C).transpose(1, 0, 2).reshape(h * j, -1)
    return LowRank(outer, inner)


def _columns(outer: Array, j: int) -> Array:
    """(h·j, r) as (j, h, r)."""
    return np.ascontiguousarray(outer.reshape(-1, j, outer.shape[1]).transpose(1, 0, 2))


def _fitted_outer(inner: Array, R: Array, C: Array) -> Array:
    """(j, h, r): least squares on the outputs of inner for each column."""
    j, h, r = len(C), C.shape[1], len(inner)
    half = inner @ R.reshape(j, R.shape[1], -1)
    A = (half.reshape(j * r * j, -1) @ inner.T).reshape(j * r, j * r)
    B = (C @ inner.T).transpose(1, 0, 2).reshape(h, j * r)
    # Columns that never vary leave A singular; their values do not matter.
    U = scipy.linalg.lstsq((A + A.T) / 2, B.T, cond=1e-12, check_finite=False)[0].T
    return np.asarray(U.reshape(h, j, r).transpose(1, 0, 2))


def _fitted_inner(outer: Array, inner: Array, R: Array, C: Array) -> Array:
    """(r, ci), by conjugate gradients from the old one; each step lowers the error."""
    W = np.einsum("mhk,jhl->mjkl", outer, outer, optimize=True)

    def product(flat: Array) -> Array:
        V = flat.reshape(inner.shape)
        # (j, r, m, ci): every column's part of V R.
        right = np.einsum("ka,jamb->jkmb", V, R, optimize=True)
        return np.asarray(np.einsum("mjkl,jlmb->kb", W, right, optimize=True)).ravel()

    wanted = np.einsum("jhk,jhb->kb", outer, C, optimize=True).ravel()
    size = inner.size
    solved, _ = cg(LinearOperator((size, size), product), wanted, inner.ravel(), rtol=1e-6, maxiter=STEPS)
    return np.asarray(solved).reshape(inner.shape)
