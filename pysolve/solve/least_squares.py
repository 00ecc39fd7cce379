"""Least squares on the kept groups, without the shrinkage of the penalty."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pysolve import _core
from pysolve.correlations import (
    LONGEST,
    Array,
    Correlations,
    Indices,
    group_columns,
    group_indices,
    pieces,
    product,
)
from pysolve.solve.problem import Matrices, Problems, one_or_all, problem_of, takes_problem

Ridge = float | Literal["auto"]

# Ridges that "auto" tries, relative to each input's own variance.
AUTO_RIDGES = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)


@takes_problem
def debias(
    problem: Problems, keep: npt.ArrayLike, *, group_size: int | None = None, ridge: Ridge = "auto"
) -> Matrices:
    """Refit on the kept groups alone, without penalty.

    Solves  min_M  ½⟨M R, M⟩ − ⟨C, M⟩ + ½ ε Σ_i R_ii ‖M_i‖²   over M that is zero outside ``keep``.

    Parameters
    ----------
    problem, group_size
        As in ``solve_linear_reconstruction``: ``debias(r_xx, r_yx, keep)`` or ``debias(correlations, keep)``.
    keep : (k,) int array
        Indices of the kept groups.
    ridge : float or "auto"
        ε, relative to each input's own variance. "auto" takes the smallest of 1e-10 … 1e-2 that leaves a
        factorisation, so that repeated or dead inputs are no error.

    Returns
    -------
    (h, d) array
        Zero on the columns of removed groups. A tuple of one a reader for several readers.

    Raises
    ------
    ValueError, TypeError
        For input that is no such problem, or where r_xx on the kept inputs is singular at ``ridge``.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> M = ps.debias(r_xx, r_yx, keep=[0, 1, 2, 3, 4])
    >>> bool(np.allclose(M[:, :5], 1)), bool((M[:, 5:] == 0).all())
    (True, True)
    """
    problem = problem_of(problem, group_size)
    columns = group_columns(_checked_keep(keep, problem.groups), problem.group_size)
    readers = zip(problem.xx, problem.yx, strict=True)
    return one_or_all([least_squares(R, C, columns, ridge) for R, C in readers])


def least_squares(R: Array, C: Array, columns: Indices, ridge: Ridge = "auto") -> Array:
    """``debias`` on checked matrices; (h, d), zero outside ``columns``."""
    check_ridge(ridge)
    M = np.zeros_like(C)
    # An input without variance has no use, and its row of R nothing to factor.
    columns = columns[np.diag(R)[columns] > 0]
    if len(columns):
        M[:, columns] = _ridge_solve(R[np.ix_(columns, columns)], C[:, columns], ridge)
    return M


# Share of the median variance below which an input counts as one that hardly ever varies.
_RARE = 1e-2


def prior_ridge(inputs: int, samples: float) -> float:
    """Ridge towards known weights, relative to each input's variance, for a fit of k inputs to n samples.

    max(1e-4, k / 10 n): with less, a fit to about as many samples as inputs follows their noise (LeNet-5 at a
    tenth of its parameters, 512 images: 97.95 instead of 99.14).
    """
    return max(1e-4, 0.1 * inputs / samples)


def pull(variance: Array) -> Array:
    """(k,) v of ``refit`` for inputs of these variances; 0 for those that never vary."""
    seen = variance > 0
    usual = np.median(variance[seen]) if seen.any() else 0.0
    return np.where(seen, np.maximum(variance, _RARE * usual), 0.0)


def refit(
    correlations: Correlations,
    columns: Indices,
    prior: Array,
    *,
    ridge: float | None = None,
    intercept: bool = True,
) -> tuple[Array, Array | None, float]:
    """Least squares on some inputs, with a ridge towards prior weights.

    Solves  min_{M, b}  ½ E‖y − M x − b‖² + ½ ε Σ_i v_i ‖M_i − prior_i‖²  with x the inputs in ``columns`` and
    v_i the variance R_ii, or a hundredth of the median variance if that is more: inputs that hardly ever
    vary, as of neurons that a few samples switch on, would get weights that fit these and throw others off.

    ε (default ``prior_ridge``) is raised tenfold until the matrix can be factored. With an intercept, inputs
    that ``Correlations.centered`` takes for constants keep their weights. Returns M (h, k), b (h,) and
    ``Correlations.share_lost`` of both; without ``intercept``, b is 0 and None is returned for it.
    """
    whole = correlations.energy - np.square(correlations.y_sum / correlations.count).sum()
    lost = whole if intercept else correlations.energy
    own = replace(correlations, group_size=1)

    def moments() -> tuple[Array, Array]:
        if intercept:
            return own.covariance(columns)
        some = own.restrict(columns)
        return some.r_xx, some.r_yx

    R, C = moments()
    variance = np.diag(R).copy()
    if ridge is None:
        ridge = prior_ridge(len(columns), correlations.count)
    varies = variance > 0
    penalty = np.where(varies, pull(variance), 1.0)
    change = C - product(prior, R)
    M = prior
    while len(columns):
        R.flat[:: len(R) + 1] += ridge * penalty
        try:
            factor = _factor(R)
        except scipy.linalg.LinAlgError:
            ridge, (R, _) = max(10 * ridge, 1e-12), moments()
            continue
        # An input that never varies keeps its weight.
        M = prior + np.where(varies, _solved(factor, change), 0.0)
        # By  M R = C − ε (M − prior) diag(v)  without another product with R.
        lost -= np.vdot(C + ridge * (M - prior) * (penalty * varies), M)
        break
    lost = max(0.0, float(lost)) / whole if whole > 0 else 0.0
    if not intercept:
        return M, None, lost
    return M, (correlations.y_sum - M @ correlations.x_sum[columns]) / correlations.count, lost


def check_ridge(ridge: Ridge) -> None:
    """ValueError unless ``ridge`` is "auto" or finite and at least 0."""
    if ridge != "auto" and not (np.isfinite(ridge) and ridge >= 0):
        raise ValueError(f'ridge must be "auto" or a number of at least 0, got {ridge!r}.')


def _ridge_solve(R: Array, C: Array, ridge: Ridge) -> Array:
    unit = np.sqrt(np.diag(R))
    R, C = R / unit / unit[:, None], C / unit
    for epsilon in AUTO_RIDGES if ridge == "auto" else (ridge,):
        raised = R.copy()
        raised.flat[:: len(R) + 1] += epsilon
        try:
            factor = _factor(raised)
        except scipy.linalg.LinAlgError:
            continue
        return _solved(factor, C) / unit
    raise ValueError(f'r_xx on the kept inputs is singular at ridge={ridge}; use a larger one or "auto".')


def _factor(R: Array) -> tuple[Array, bool]:
    """Cholesky factor of R, in its place."""
    if len(R) ** 3 > 3 * LONGEST:
        # In pieces, unlike SciPy's.
        if not _core.cholesky(R):
            raise scipy.linalg.LinAlgError("not positive definite")
        return R.T, True
    # Of the transpose, which is the same matrix, in the order that LAPACK overwrites without a copy.
    found = scipy.linalg.cho_factor(R.T, lower=True, check_finite=False, overwrite_a=True)
    return found[0], found[1]


def _solved(factor: tuple[Array, bool], C: Array) -> Array:
    """C (R + ridge I)⁻¹, some outputs at a time: an interrupt waits for no more."""
    found = np.empty_like(C)
    for rows in pieces(len(C), C.shape[1] ** 2):
        found[rows] = scipy.linalg.cho_solve(factor, C[rows].T, check_finite=False).T
    return found


def _checked_keep(keep: npt.ArrayLike, groups: int) -> Indices:
    indices = group_indices(keep)
    if indices.ndim != 1 or len(np.unique(indices)) != len(indices):
        raise ValueError("keep must be a list of group indices, each once.")
    if indices.size and not 0 <= indices.min() <= indices.max() < groups:
        raise ValueError(f"keep must lie within 0 … {groups - 1}, got {indices.min()} … {indices.max()}.")
    return indices
