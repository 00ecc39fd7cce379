"""A few values that all weights of a layer share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pysolve.correlations import Array
from pysolve.layer.clusters import k_means, nearest
from pysolve.layer.targets import Target

Codes = npt.NDArray[np.int64]

# Share of the first residual at which the normal equations count as solved.
_SOLVED = 1e-8


@dataclass(frozen=True, eq=False)
class SharedValues:
    """The values that codes 0, 1, … stand for.

    Parameters
    ----------
    centroids : (k,) array
        Of single precision.
    zero : bool
        Whether the first one is zero, and stays so.
    """

    centroids: Array
    zero: bool = False

    def codes(self, values: Array, columns: Any = None, curvature: Any = None) -> Codes:
        """Codes of the nearest values."""
        order = np.argsort(self.centroids, kind="stable")
        return np.asarray(order[nearest(values, self.centroids[order])], np.int64)

    def values(self, codes: Codes, columns: Any = None) -> Array:
        """What the codes stand for."""
        return np.asarray(self.centroids[codes])

    def price(self, codes: Codes) -> float:
        """Nothing: all codes have equally many bits."""
        return 0.0

    def zero_codes(self, columns: Any = None) -> int:
        """The code of zero."""
        return 0

    def refit(self, codes: Codes, target: Target) -> Self:
        """Values of least error for given codes, exactly.

        Solves  min_c  ½ Σ_i w_i ‖(P c − V)_i‖²_A, P c the weights of those codes: k normal equations, by
        conjugate gradients on the layer itself, which takes a product with A an iteration and never forms
        them.
        """
        k, flat, rows = len(self.centroids), codes.ravel(), target.rows[:, None]

        def gathered(M: Array) -> Array:
            sums = np.asarray(np.bincount(flat, (rows * M).ravel(), k), np.float64)
            sums[: self.zero] = 0.0
            return sums

        residual = gathered(target.product(target.V - self.values(codes)))
        scale = gathered(np.broadcast_to(target.diagonal, codes.shape))
        scale = 1.0 / np.where(scale > 0, scale, np.inf)
        change, step = np.zeros(k), scale * residual
        size = first = float(residual @ step)
        for _ in range(2 * k):
            if size <= _SOLVED**2 * first:
                break
            product = gathered(target.product(step[codes]))
            length = size / float(step @ product)
            change += length * step
            residual -= length * product
            last, size = size, float(residual @ (scale * residual))
            step = scale * residual + (size / last) * step
        return replace(self, centroids=_single(self.centroids + change))


def share_values(
    W: Array,
    size: int,
    *,
    mask: npt.NDArray[np.bool_] | None = None,
    zero: bool | None = None,
    weights: Array | None = None,
) -> SharedValues:
    """At most ``size`` values for the weights W (h, d): k-means, optimal for nearest rounding.

    Parameters
    ----------
    W : (h, d) array
    size : int
        At least 2.
    mask : (h, d) bool array, optional
        Which weights differ from zero; the others have the first value, which is zero.
    zero : bool, optional
        Whether the first value is zero; by default, where there is a mask.
    weights : (d,) or (h, d) array, optional
        What a square error counts.
    """
    zero = mask is not None if zero is None else zero or mask is not None
    inside = np.ones(W.shape, bool) if mask is None else mask
    share = None if weights is None else np.broadcast_to(weights, W.shape)[inside]
    centres = k_means(W[inside], size - zero, share) if inside.any() else np.zeros(1 - zero)
    return SharedValues(_single(np.concatenate([np.zeros(int(zero)), centres])), zero)


def _single(values: Array) -> Array:
    """The nearest numbers of single precision, which is what is stored."""
    return np.asarray(values.astype(np.float32), np.float64)
