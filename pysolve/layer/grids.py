"""Evenly spaced values that weights may take: codes of few bits times a scale."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pysolve import _core
from pysolve.correlations import Array
from pysolve.forms import Integers
from pysolve.layer.rounding import Codes, Columns, Target

# Shares of the range of the weights that are tried; at 2 bits the best one is often below a half. Weights of
# inputs that hardly vary may be hundreds of times as large as all others.
_SHARES = np.concatenate([np.linspace(1.0, 0.3, 29), np.geomspace(0.2, 0.001, 12)])


@dataclass(frozen=True, eq=False)
class Grid:
    """The values scale · (code − zero) for codes −2^(bits − 1) … 2^(bits − 1) − 1.

    ``scales`` (h, groups), positive and of single precision, has one for every output and ``group`` of
    consecutive inputs; ``zeros`` (h, groups) the codes of zero, all 0 for a symmetric grid.
    """

    scales: Array = field(repr=False)
    zeros: Array = field(repr=False)
    bits: int
    group: int

    @cached_property
    def compiled(self) -> _core.GridLevels:
        """The same values, for whole blocks of inputs."""
        low, high = _limits(self.bits)
        return _core.GridLevels(scales=self.scales, zeros=self.zeros, low=low, high=high, group=self.group)

    def codes(self, values: Array, columns: Columns, curvature: npt.ArrayLike = 1.0) -> Codes:
        """Codes of the nearest values: (h,) for one column, (h, n) for several."""
        part = np.floor_divide(columns, self.group)
        low, high = _limits(self.bits)
        found = np.rint(values / self.scales[:, part]) + self.zeros[:, part]
        return np.asarray(np.clip(found, low, high), np.int64)

    def values(self, codes: Codes, columns: Columns) -> Array:
        """Values of the codes."""
        part = np.floor_divide(columns, self.group)
        return np.asarray((codes - self.zeros[:, part]) * self.scales[:, part])

    def round(self, values: Array, columns: Columns) -> Array:
        """The nearest values."""
        return self.values(self.codes(values, columns), columns)

    def price(self, codes: Codes) -> float:
        """0: all codes have equally many bits."""
        return 0.0

    def zero_codes(self, columns: Columns) -> Codes:
        """Codes of zero, for every row of the columns."""
        return np.asarray(self.zeros[:, np.floor_divide(columns, self.group)], np.int64)

    def refit(self, codes: Codes, target: Target) -> Grid:
        """Scales of least error for given codes, one group after the other; exact for one group a row."""
        columns = np.arange(codes.shape[1])
        step, scales = codes - self.zeros[:, columns // self.group], self.scales.copy()
        slope = target.product(self.values(codes, columns) - target.V)
        for part in range(scales.shape[1]):
            own = slice(part * self.group, (part + 1) * self.group)
            along = step[:, own] if target.A is None else step[:, own] @ target.A[own]
            inner = along if target.A is None else along[:, own]
            curvature = np.einsum("ij,ij->i", inner, step[:, own])
            wanted = np.einsum("ij,ij->i", slope[:, own], step[:, own])
            moved = scales[:, part] - wanted / np.where(curvature > 0, curvature, np.inf)
            moved = np.where(moved > 0, moved, scales[:, part]).astype(np.float32).astype(np.float64)
            slope[:, own if target.A is None else slice(None)] += (moved - scales[:, part])[:, None] * along
            scales[:, part] = moved
        return replace(self, scales=scales)

    def form(self, codes: Codes) -> Integers:
        """The weight of those codes as it is stored, in single precision."""
        zeros = self.zeros.astype(np.int8) if self.zeros.any() else None
        return Integers(codes.astype(np.int8), self.scales.astype(np.float32), zeros, self.bits, self.group)


def fit_grid(
    W: Array, bits: int, *, symmetric: bool = True, group: int | None = None, weights: Array | None = None
) -> Grid:
    """A grid for weights W (h, d) under nearest rounding; one scale a row where there is no ``group``.

    Symmetric, zero is code 0; else the grid spans least to greatest weight, with zero among its values. With
    ``weights`` of the square errors, (d,) or (h, d), its range is the best share of that of W, of 41 from 1
    to 0.001, 29 of them down to 0.3; without, the range of W itself.
    """
    d = W.shape[1]
    group = max(1, min(group or d, d))
    starts = np.arange(0, d, group)
    if not W.size:
        return Grid(np.ones((len(W), len(starts))), np.zeros((len(W), len(starts))), bits, group)
    low = np.minimum(np.minimum.reduceat(W, starts, axis=1), 0.0)
    high = np.maximum(np.maximum.reduceat(W, starts, axis=1), 0.0)
    best = _spanning(low, high, bits, group, symmetric)
    if weights is None:
        return best
    columns, least = np.arange(d), None
    for share in _SHARES:
        grid = _spanning(share * low, share * high, bits, group, symmetric)
        lost = np.add.reduceat(weights * np.square(grid.round(W, columns) - W), starts, axis=1)
        least = lost if least is None else least
        better = lost < least
        scales = np.where(better, grid.scales, best.scales)
        best = replace(best, scales=scales, zeros=np.where(better, grid.zeros, best.zeros))
        least = np.minimum(lost, least)
    return best


def _limits(bits: int) -> tuple[int, int]:
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _spanning(low: Array, high: Array, bits: int, group: int, symmetric: bool) -> Grid:
    """The grid from low to high; scales of single precision, 1 where low and high are 0."""
    first, last = _limits(bits)
    wide = np.maximum(-low, high) / last if symmetric else (high - low) / (last - first)
    scales = wide.astype(np.float32).astype(np.float64)
    scales[scales == 0] = 1.0
    zeros = np.zeros_like(scales) if symmetric else np.clip(np.rint(first - low / scales), first, last)
    return Grid(scales, zeros, bits, group)
