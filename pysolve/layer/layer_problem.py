"""Least squares where every output of a layer has inputs of its own.

With R = E[x xᵀ], C = E[y xᵀ] and the layer's own weights W, every row i of M solves on its support

    min_M  ½ E‖y − M x‖² + ½ ε Σ_j R_jj ‖M_j − W_j‖²        M_ij = 0 outside the mask.

In inputs of unit variance that is ½⟨M A, M⟩ − ⟨B, M⟩ with A = D^-½ R D^-½ + ε I and B = C D^-½ + ε W D^½,
D = diag(R); an input that never varies stands by itself, and keeps its weights where the mask does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pysolve.correlations import AnyArray, Array, Correlations, Indices, Mask, product
from pysolve.layer.masks import checked_mask
from pysolve.solve.least_squares import Ridge, check_ridge, least_squares, prior_ridge
from pysolve.solve.problem import checked_correlations, checked_matrix, checked_reader, half_trace

Single = npt.NDArray[np.float32]

# Ridges that "auto" tries.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Multiplications of a row's own Cholesky factorisation, for each one of its product with A, up to which it is
# faster than the iterations that conjugate gradients need for a relative error of 1e-8 (measured at d = 800);
# and rows that are worked on together.
_DIRECT, ITERATIONS, _BLOCK = 32.0, 100, 256


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """The least-squares problem of a layer with own weights W (h, d).

    R is E[x xᵀ], C is E[y xᵀ] (None where y = W x), ``energy`` E‖y‖², ``ridge`` ε. ``unit`` (d,) has the
    deviation of every input; of the ``dead`` ones, which never vary, a number so small that their weights are
    removed first. ``correlations`` has the means of x and y, where they are known.
    """

    W: Array = field(repr=False)
    R: Array = field(repr=False)
    C: Array | None = field(repr=False)
    energy: float
    ridge: float
    unit: Array = field(repr=False)
    dead: Mask = field(repr=False)
    correlations: Correlations | None = field(default=None, repr=False)

    def metric(self, order: Indices | None = None) -> Array:
        """A, or A with rows and columns in another order: a new (d, d) array."""
        unit, dead = (self.unit, self.dead) if order is None else (self.unit[order], self.dead[order])
        A = self.R.copy() if order is None else self.R[np.ix_(order, order)]
        A /= unit
        A /= unit[:, None]
        A[dead] = A[:, dead] = 0.0
        A.flat[:: len(A) + 1] = np.where(dead, 1.0, np.diag(A)) + self.ridge
        return A

    def target(self, A: AnyArray, rows: slice = slice(None)) -> Array:
        """Rows of B, given the metric A."""
        W = self.W[rows] * self.unit
        if self.C is None:
            return product(W, A)
        B = self.C[rows] / self.unit + self.ridge * W
        B[:, self.dead] = (1.0 + self.ridge) * W[:, self.dead]
        return np.asarray(B)

    def optimum(self) -> Array:
        """B A⁻¹, the best weights of unit inputs without any zeros."""
        if self.C is None:
            return np.asarray(self.W * self.unit)
        A = self.metric()
        B = self.target(A)
        factor = scipy.linalg.cho_factor(A, lower=True, overwrite_a=True, check_finite=False)
        return np.asarray(scipy.linalg.cho_solve(factor, B.T, overwrite_b=True, check_finite=False).T)

    def error(self, M: Array) -> float:
        """E‖y − M x‖² / E‖y‖² for weights M of the inputs as they are, without the ridge."""
        # Around W: nothing cancels where y = W x.
        missed = 0.0 if self.C is None else self.energy
        for part in blocks(len(M)):
            change = M[part] - self.W[part]
            missed += float(np.vdot(product(change, self.R), change))
            if self.C is not None:
                left = product(self.W[part], self.R) - self.C[part]
                missed += float(np.vdot(left, 2 * change + self.W[part]))
                missed -= float(np.vdot(self.C[part], self.W[part]))
        return max(0.0, missed) / (self.energy or 1.0)

    def bias(self, M: Array) -> Array | None:
        """E[y] − M E[x]; None where the means are not known."""
        return None if self.correlations is None else self.correlations.bias(M)


def layer_problem(
    W: npt.ArrayLike,
    r_xx: Correlations | npt.ArrayLike,
    r_yx: npt.ArrayLike | None = None,
    *,
    ridge: Ridge = "auto",
) -> LayerProblem:
    """The problem of a layer with weights W (h, d) on what it reads and should output.

    A Correlations is centred, since the bias is free; its y may be another network's outputs. E[x xᵀ] and
    E[y xᵀ] are taken as they are, y as far as x explains it; without ``r_yx``, y = W x.
    """
    W = checked_matrix("W", W)
    R, C = checked_layer(W, r_xx, r_yx)
    check_ridge(ridge)
    correlations = r_xx if isinstance(r_xx, Correlations) else None
    if isinstance(r_xx, Correlations):
        own = r_xx.centered()
        R, C, energy = own.r_xx, own.r_yx, own.energy
    elif C is not None:
        energy = float(np.trace(explained(R, C)))
    else:
        energy = sum(float(np.vdot(product(W[part], R), W[part])) for part in blocks(len(W)))
    variance = np.diag(R)
    dead = variance <= 0
    unit = np.sqrt(np.where(dead, 0.0, variance))
    # Weights of dead inputs rank below all others, but keep their order, in single precision too.
    most, live = np.abs(W[:, dead]).max(initial=0.0), np.abs(W * unit).max(initial=0.0)
    unit[dead] = 1e-20 * (live or 1.0) / (most or 1.0)
    least = RIDGES[0] if correlations is None else prior_ridge(len(R), correlations.count)
    return _with_ridge(LayerProblem(W, R, C, energy, 0.0, unit, dead, correlations), ridge, least)


def check_alone(r_xx: object, r_yx: object) -> None:
    """TypeError when r_yx comes with a Correlations or without any r_xx."""
    if r_yx is not None and (r_xx is None or isinstance(r_xx, Correlations)):
        raise TypeError("r_yx goes with a matrix r_xx; a Correlations comes alone.")


def checked_layer(
    W: Array, r_xx: Correlations | npt.ArrayLike, r_yx: npt.ArrayLike | None
) -> tuple[Array, Array | None]:
    """E[x xᵀ] and E[y xᵀ] (None: y = W x) of a layer with weights W, as far as data can have them."""
    check_alone(r_xx, r_yx)
    if isinstance(r_xx, Correlations):
        half_trace(r_xx.r_yy, [len(r_xx.yx)])
        r_yx, r_xx = r_xx.r_yx, r_xx.r_xx
    R, C = (checked_correlations("r_xx", r_xx), None) if r_yx is None else checked_reader(r_xx, r_yx)[:2]
    if R.shape != (W.shape[1],) * 2 or (C is not None and C.shape != W.shape):
        got = f"{R.shape}" + ("" if C is None else f" and yx of {C.shape}")
        raise ValueError(
            f"W is {W.shape[0]} x {W.shape[1]}, so its inputs' correlations must be {(W.shape[1],) * 2}, "
            f"got {got}. A convolution's weights come as weight.flatten(1)."
        )
    return R, C


def explained(R: Array, C: Array) -> Array:
    """C R⁺ Cᵀ: E[ŷ ŷᵀ] of the best linear prediction ŷ of y from x, (h, h)."""
    yy = product(least_squares(R, C, np.arange(len(R))), C.T)
    return np.asarray((yy + yy.T) / 2)


def refit_rows(
    problem: LayerProblem,
    mask: npt.ArrayLike,
    start: Array | None = None,
    *,
    iterations: int = ITERATIONS,
    single: bool = False,
    overwrite: bool = False,
) -> Array:
    """The (h, d) weights of least error that are zero outside ``mask``.

    Small supports are solved one by one, exactly; those of k > 4.6 d^⅔ inputs together, by conjugate
    gradients from ``start`` (weights of the inputs as they are; the layer's own by default): every iteration
    lowers the error, 100 leave about 1e-8 of what can be gained. ``single``: everything by conjugate
    gradients, in single precision, for few iterations on large layers. ``overwrite``: the result takes the
    place of ``start``.
    """
    keep = checked_mask(mask, problem.W.shape)
    first = problem.W if start is None else start
    A: AnyArray = problem.metric()
    if single:
        A = A.astype(np.float32)
    M = first if overwrite and start is not None else np.empty(keep.shape)
    for part in blocks(len(M)):
        inside, near = keep[part], first[part] * problem.unit
        near[~inside] = 0.0
        fitted = _refined if single else _fitted
        M[part] = fitted(problem, A, part, inside, near, iterations) / problem.unit
    M[:, problem.dead] = np.where(keep[:, problem.dead], problem.W[:, problem.dead], 0.0)
    return M


def blocks(rows: int, size: int = _BLOCK) -> Iterator[slice]:
    """Consecutive slices of the rows, so that no product of all of them is stored."""
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def _fitted(problem: LayerProblem, A: Array, part: slice, inside: Mask, M: Array, iterations: int) -> Array:
    """Some rows of M on their own supports, in unit inputs; M is where conjugate gradients begin."""
    sizes, B = inside.sum(1), problem.target(A, part)
    direct = sizes.astype(float) ** 3 / 3 <= _DIRECT * len(A) ** 2
    for i in np.flatnonzero(direct & (sizes > 0)):
        s = np.flatnonzero(inside[i])
        factor = scipy.linalg.cho_factor(A[np.ix_(s, s)], lower=True, overwrite_a=True, check_finite=False)
        M[i, s] = scipy.linalg.cho_solve(factor, B[i, s], check_finite=False)
    if not direct.all():
        rest, B = inside[~direct], B[~direct]
        residual = np.where(rest, B - M[~direct] @ A, 0.0)
        limit = 1e-20 * np.square(np.where(rest, B, 0.0)).sum(1)
        M[~direct] += _conjugate_gradients(A, residual, rest, limit, iterations)
    return M


def _refined(problem: LayerProblem, A: Single, part: slice, inside: Mask, M: Array, iterations: int) -> Array:
    """The same rows, only by conjugate gradients and in single precision."""
    if problem.C is None:
        residual = (problem.W[part] * problem.unit - M).astype(np.float32) @ A
    else:
        residual = problem.target(A, part) - M.astype(np.float32) @ A
    residual = np.where(inside, residual, 0.0)
    # In units in which no square is too small.
    peak = float(np.abs(residual).max(initial=0.0)) or 1.0
    residual, limit = (residual / peak).astype(np.float32), np.zeros(len(M))
    return np.asarray(M + peak * _conjugate_gradients(A, residual, inside, limit, iterations))


def _conjugate_gradients(
    A: AnyArray, residual: AnyArray, inside: Mask, limit: Array, iterations: int
) -> AnyArray:
    """Change of rows that miss B by ``residual`` on their supports; every step lowers the objective."""
    step, square, change = residual.copy(), np.square(residual).sum(1), np.zeros_like(residual)
    for _ in range(iterations):
        going = square > limit
        if not going.any():
            break
        product = step @ A
        product[~inside] = 0
        curvature = np.einsum("ij,ij->i", step, product)
        length = np.where(going, square / np.where(curvature > 0, curvature, np.inf), 0)[:, None]
        change += length * step
        residual -= length * product
        last, square = square, np.square(residual).sum(1)
        step *= (square / np.where(last > 0, last, 1))[:, None]
        step += residual
    return change


def _with_ridge(problem: LayerProblem, ridge: Ridge, least: float) -> LayerProblem:
    """The problem with the given ridge, or the smallest from ``least`` on that leaves a factorisation."""
    larger = (least, *(epsilon for epsilon in RIDGES if epsilon > least))
    for epsilon in larger if ridge == "auto" else (float(ridge),):
        problem = replace(problem, ridge=epsilon)
        try:
            scipy.linalg.cholesky(problem.metric().T, lower=True, overwrite_a=True, check_finite=False)
            return problem
        except scipy.linalg.LinAlgError:
            continue
    raise ValueError(
        f"r_xx is not positive definite at ridge={problem.ridge:g}: it is no E[x xᵀ]"
        + (", or gathered in too low a precision." if ridge == "auto" else ', or singular; use "auto".')
    )
