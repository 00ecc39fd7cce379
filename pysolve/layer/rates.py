"""Values that a layer shares where every weight costs as many bits as entropy coding takes for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from pysolve.correlations import Array
from pysolve.layer.codebooks import Codes, SharedValues
from pysolve.layer.layer_problem import blocks
from pysolve.layer.targets import Target

# Of the step of a codebook, in units of the root of lam by curvature.
_STEP = 6.0
# Curvature below which an input does not count.
_FLAT = 1e-300


@dataclass(frozen=True, eq=False)
class PricedValues(SharedValues):
    """Shared values, and what each costs beside its error: ``lam`` times −log₂ of how often it occurs.

    Parameters
    ----------
    centroids, zero
        As ``SharedValues`` has them.
    lam : float
        What a bit costs, in units of the loss.
    bits : (k,) array
        Of each value's code.
    """

    lam: float = 0.0
    bits: Any = None

    def codes(self, values: Array, columns: Any = None, curvature: Any = None) -> Codes:
        """Codes of least ½ curvature (value − centroid)² + lam · bits."""
        # Less what all codes have in common, and by curvature: one product gives all k of them.
        lines = np.stack([-self.centroids, self.bits, 0.5 * np.square(self.centroids)])
        curvature = np.broadcast_to(curvature, values.shape)
        found = np.empty(values.shape, np.int64)
        for rows in blocks(len(values)):
            v, ratio = values[rows], self.lam / np.maximum(curvature[rows], _FLAT)
            found[rows] = np.argmin(np.stack([v, ratio, np.ones_like(v)], -1) @ lines, axis=-1)
        return found

    def price(self, codes: Codes) -> float:
        """Of all codes together."""
        return self.lam * float(np.bincount(codes.ravel(), minlength=len(self.bits)) @ self.bits)

    def refit(self, codes: Codes, target: Target) -> Self:
        """Values of least error for given codes, and the bits that these take."""
        return replace(super().refit(codes, target), bits=code_lengths(codes, len(self.centroids)))


def spaced_values(target: Target, size: int, lam: float) -> PricedValues:
    """At most ``size`` multiples of a step, and the bits that nearest rounding has them take.

    The step's square is 36 lam over the mean curvature of a weight. (To many bits a weight 12 lam / ln 2 is
    the best one; wider steps lose nothing there, for the values are fitted afterwards, and gain 5 % to 10 %
    of the objective at few bits.)
    """
    curvature = float(target.diagonal.mean() * target.rows.mean()) if target.V.size else 0.0
    step = _STEP * math.sqrt(lam / (curvature or 1.0))
    # What is not worth one bit becomes zero anyway.
    worth = 0.5 * np.outer(target.rows, target.diagonal) * np.square(target.V) > lam
    top = float(np.abs(target.V).max(initial=0.0, where=worth))
    most = max(1, (size - 1) // 2)
    step = max(step, top / most)
    steps = np.arange(1, int(np.ceil(top / step)) + 1) if step > 0 else np.zeros(0)
    centroids = (step * np.concatenate([[0], steps, -steps])[:size]).astype(np.float32).astype(np.float64)
    start = SharedValues(centroids, zero=True)
    return PricedValues(centroids, True, lam, code_lengths(start.codes(target.V), len(centroids)))


def code_lengths(codes: Codes, size: int) -> Array:
    """−log₂ of how often each code occurs; one that does not, as though it did half a time."""
    counts = np.bincount(codes.ravel(), minlength=size)
    return np.asarray(np.log2(max(1, codes.size)) - np.log2(np.where(counts > 0, counts, 0.5)))
