"""A few values that all weights of a layer share: of equal bits, or priced by what entropy coding takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from pysolve import _core
from pysolve.correlations import Array, Indices, Mask
from pysolve.forms import Codebook
from pysolve.layer.clusters import k_means, nearest
from pysolve.layer.layer_problem import blocks
from pysolve.layer.rounding import Codes, Columns, Target

# Share of the first residual at which the normal equations count as solved.
_SOLVED = 1e-8
# Step of a priced codebook, in units of the root of lam by curvature.
_STEP = 6.0
# Curvature below which an input does not count.
_FLAT = 1e-300


@dataclass(frozen=True, eq=False)
class SharedValues:
    """The values, of single precision, that codes 0, 1, … stand for; ``zero``: the first remains zero."""

    centroids: Array
    zero: bool = False

    @cached_property
    def compiled(self) -> _core.Levels:
        """The same values, for whole blocks of inputs."""
        return _core.SharedLevels(self.centroids)

    def codes(self, values: Array, columns: Columns | None = None, curvature: npt.ArrayLike = 1.0) -> Codes:
        """Codes of the nearest values."""
        return np.asarray(self._order[nearest(values, self.centroids[self._order])], np.int64)

    @cached_property
    def _order(self) -> Indices:
        """Values by size."""
        return np.argsort(self.centroids, kind="stable")

    def values(self, codes: Codes, columns: Columns | None = None) -> Array:
        """Values of the codes."""
        return np.asarray(self.centroids[codes])

    def price(self, codes: Codes) -> float:
        """0: all codes have equally many bits."""
        return 0.0

    def zero_codes(self, columns: Columns | None = None) -> int:
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
            curvature = float(step @ product)
            if not curvature > 0:
                break
            length = size / curvature
            change += length * step
            residual -= length * product
            last, size = size, float(residual @ (scale * residual))
            step = scale * residual + (size / last) * step
        return replace(self, centroids=_single(self.centroids + change))

    def form(self, codes: Codes) -> Codebook:
        """The weight of those codes as it is stored, in single precision."""
        return Codebook(codes.astype(np.uint8), self.centroids.astype(np.float32))


@dataclass(frozen=True, eq=False, kw_only=True)
class PricedValues(SharedValues):
    """Shared values that each cost ``lam`` times −log₂ of their share of the weights, beside their error.

    ``lam`` is the price of a bit, in units of the loss, ``bits`` (k,) the length of each value's code.
    """

    lam: float
    bits: Array

    @cached_property
    def compiled(self) -> _core.Levels:
        """The same values and prices, for whole blocks of inputs."""
        return _core.PricedLevels(values=self.centroids, bits=self.bits, lam=self.lam)

    def codes(self, values: Array, columns: Columns | None = None, curvature: npt.ArrayLike = 1.0) -> Codes:
        """Codes of least ½ curvature (value − centroid)² + lam · bits."""
        # Less what all codes have in common, and by curvature: one product gives all k of them.
        ratio = np.broadcast_to(self.lam / np.maximum(curvature, _FLAT), values.shape)
        found = np.empty(values.shape, np.int64)
        for rows in blocks(len(values)):
            terms = np.ones((*values[rows].shape, 3))
            terms[..., 0] = values[rows]
            terms[..., 1] = ratio[rows]
            (terms @ self._lines).argmin(-1, out=found[rows])
        return found

    @cached_property
    def _lines(self) -> Array:
        """(3, k) what value, price by curvature, and 1 are multiplied with."""
        return np.stack([-self.centroids, self.bits, 0.5 * np.square(self.centroids)])

    def price(self, codes: Codes) -> float:
        """Price of all codes together."""
        return self.lam * float(np.bincount(codes.ravel(), minlength=len(self.bits)) @ self.bits)

    def refit(self, codes: Codes, target: Target) -> Self:
        """Values of least error for given codes, and the bits that these take."""
        return replace(super().refit(codes, target), bits=code_lengths(codes, len(self.centroids)))

    def form(self, codes: Codes) -> Codebook:
        """The weight of those codes as it is stored, without the values that none of them has."""
        used, codes = np.unique(codes, return_inverse=True)
        return Codebook(codes.astype(np.uint8), self.centroids[used].astype(np.float32))


def share_values(
    W: Array,
    size: int,
    *,
    mask: Mask | None = None,
    zero: bool | None = None,
    weights: Array | None = None,
) -> SharedValues:
    """At most ``size`` ≥ 2 values for the weights W (h, d): k-means, optimal for nearest rounding.

    Weights outside the mask have the first value, which is zero then, and otherwise where ``zero`` says so.
    ``weights``, (d,) or (h, d), are those of the square errors.
    """
    zero = mask is not None if zero is None else zero or mask is not None
    inside = np.ones(W.shape, bool) if mask is None else mask
    share = None if weights is None else np.broadcast_to(weights, W.shape)[inside]
    centres = k_means(W[inside], size - zero, share) if inside.any() else np.zeros(1 - zero)
    return SharedValues(_single(np.concatenate([np.zeros(int(zero)), centres])), zero)


def spaced_values(target: Target, size: int, lam: float) -> PricedValues:
    """At most ``size`` multiples of a step, and the bits that nearest rounding has them take.

    The step's square is 36 lam over the mean curvature of a weight. (At many bits a weight 12 lam / ln 2 is
    the best; wider steps lose nothing there, since the values are fitted afterwards, and gain 5 % to 10 % of
    the objective at few bits.)
    """
    curvature = float(target.diagonal.mean() * target.rows.mean()) if target.V.size else 0.0
    step = _STEP * math.sqrt(lam / (curvature or 1.0))
    # A weight whose whole energy is below the price of one bit becomes zero anyway.
    active = 0.5 * np.outer(target.rows, target.diagonal) * np.square(target.V) > lam
    top = float(np.abs(target.V).max(initial=0.0, where=active))
    most = max(1, (size - 1) // 2)
    step = max(step, top / most)
    steps = np.arange(1, int(np.ceil(top / step)) + 1) if step > 0 else np.zeros(0)
    centroids = (step * np.concatenate([[0], steps, -steps])[:size]).astype(np.float32).astype(np.float64)
    start = SharedValues(centroids, zero=True)
    lengths = code_lengths(start.codes(target.V), len(centroids))
    return PricedValues(centroids, True, lam=lam, bits=lengths)


def code_lengths(codes: Codes, size: int) -> Array:
    """−log₂ of the share of each code; of one that does not occur, as though it did half a time."""
    counts = np.bincount(codes.ravel(), minlength=size)
    return np.asarray(np.log2(max(1, codes.size)) - np.log2(np.where(counts > 0, counts, 0.5)))


def _single(values: Array) -> Array:
    """The nearest numbers of single precision, as they are stored."""
    return np.asarray(values.astype(np.float32), np.float64)
