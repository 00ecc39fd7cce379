"""Exact elimination in every row of a layer: how low the error can be with any number of weights.

Row by row, the weight whose loss costs least is removed, and the kept ones compensate it (optimal brain
surgeon); all rows begin with the same inverse. The losses of a row from one weight to the next, made convex,
tell how many weights each row, and each layer, should have of a number that they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.optimize import isotonic_regression

from pysolve import _core
from pysolve.correlations import Array, Correlations, Mask
from pysolve.errors import whole
from pysolve.layer.layer_problem import LayerProblem, layer_problem
from pysolve.layer.masks import keep_largest
from pysolve.solve.least_squares import Ridge

# Multiplications that a curve may take; beyond, some of the rows stand for all.
_EFFORT = 1e11


@dataclass(frozen=True, eq=False)
class RowPaths:
    """The ``order`` (h, d) in which the inputs of every row are removed, and the ``loss`` (h, d) with each.

    A loss is the rise of ½ E‖y − M x‖² (and of the ridge towards W), the others refitted; pooled with its
    neighbours where losses would fall, so that no row of it ever falls.
    """

    order: npt.NDArray[np.int32]
    loss: Array


def row_paths(problem: LayerProblem, rows: npt.ArrayLike | None = None) -> RowPaths:
    """The elimination of every row, or of some; h d³ / 3 operations."""
    V = problem.optimum()
    V = np.ascontiguousarray(V if rows is None else V[np.asarray(rows)])
    A = problem.metric()
    peak = float(np.abs(V).max(initial=0.0)) or 1.0
    factor, _ = scipy.linalg.cho_factor(A, lower=True, overwrite_a=True, check_finite=False)
    half, _ = scipy.linalg.lapack.dpotri(factor, lower=True, overwrite_c=True)
    inverse = np.tril(half)
    inverse += np.tril(half, -1).T
    order, change = _core.eliminate_rows(inverse, V / peak)
    loss = np.array([isotonic_regression(row).x for row in change]) if change.size else change
    return RowPaths(order, np.asarray(loss * peak**2))


def rows_kept(problem: LayerProblem, count: int) -> Mask:
    """The mask of ``count`` weights with the least total error that rows cut off their paths can have."""
    paths = row_paths(problem)
    # Of losses that are pooled, the ones at the end of the path are kept first.
    kept = keep_largest(paths.loss[:, ::-1], count)[:, ::-1].sum(1)
    d = paths.order.shape[1]
    mask = np.zeros(paths.order.shape, bool)
    np.put_along_axis(mask, paths.order.astype(np.intp), np.arange(d) >= d - kept[:, None], axis=1)
    return mask


def error_curve(W: npt.ArrayLike, r_xx: Correlations | npt.ArrayLike, *, ridge: Ridge = "auto") -> Array:
    """(h · d + 1,) errors E‖y − M x‖² / E‖y‖² of a layer with 0, 1, 2 … kept weights.

    The kept weights compensate the others; problem as in ``obs_prune``. Convex and never rising; at the end
    0, or the error of the best dense weights. By elimination row by row; of layers of more than about
    600 × 800 from evenly spaced rows.
    """
    problem = layer_problem(W, r_xx, ridge=ridge)
    h, d = problem.W.shape
    rows = np.unique(np.linspace(0, h - 1, max(1, min(h, int(3 * _EFFORT / max(d, 1) ** 3)))).astype(int))
    loss = np.sort(row_paths(problem, rows if h else None).loss, axis=None)[::-1]
    curve = np.concatenate([[0.0], np.cumsum(loss)])
    share = np.interp(np.linspace(0, len(loss), h * d + 1), np.arange(len(curve)), curve) / (curve[-1] or 1.0)
    # The ridge towards W is in the losses, so only their shares of the whole fall are taken.
    left = problem.error(problem.optimum() / problem.unit)
    return np.asarray(left + (float(problem.energy > 0) - left) * (1 - share))


def share_weights(
    curves: Mapping[str, Array], count: int, *, importance: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Share ``count`` weights among layers, for the least sum of errors, each times its layer's importance.

    Errors as shares of each layer's own output energy, as the convex curves of ``error_curve`` have them,
    compare well between layers: an MLP on MNIST with 2 % of its weights keeps 95.7 % accuracy so, 95.4 % when
    the errors count by their energy, and 87.7 % with 2 % of each layer.
    """
    total = sum(len(curve) - 1 for curve in curves.values())
    count = whole("count, of the weights of all layers,", count, 0, total)
    falls = [
        -np.diff(curve) * (1.0 if importance is None else importance[name]) for name, curve in curves.items()
    ]
    kept = keep_largest(np.concatenate([np.zeros(0), *falls]), count)
    parts = np.split(kept, np.cumsum([len(fall) for fall in falls])[:-1])
    return {name: int(part.sum()) for name, part in zip(curves, parts, strict=True)}
