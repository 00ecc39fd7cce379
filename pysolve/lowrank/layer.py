"""One layer at low rank: by its weights alone, or by what its outputs lose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import scipy.linalg

from pysolve.correlations import Array, Correlations
from pysolve.forms import LowRank
from pysolve.lowrank.spatial import as_kernels, plain_spatial, refitted, spatial_spectrum, spatial_start
from pysolve.lowrank.spectrum import activation_spectrum, plain_spectrum

Kernel = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FactoredLayer:
    """New weights of one layer.

    Parameters
    ----------
    weight : (h, d) array
        The product of the factors, as a matrix.
    bias : (h,) array or None
        The bias that goes with it, E[y] − M E[x]; None when nothing is known of x.
    error : float
        E‖y − M x − b‖² / E‖y − E[y]‖² on the correlations, without the pull to the old weights; of weights
        alone, ‖W − M‖² / ‖W‖².
    form : LowRank
        The factors, in the shapes of the layers' weights.
    """

    weight: Array = field(repr=False)
    bias: Array | None = field(repr=False)
    error: float
    form: LowRank = field(repr=False)


def factor_layer(
    W: Array,
    correlations: Correlations | None,
    rank: int,
    *,
    kernel: Kernel = (),
    spatial: bool = False,
    metric: Array | None = None,
) -> FactoredLayer:
    """The best layer of a rank:  min E (y − M x − b)ᵀ S (y − M x − b) .

    Parameters
    ----------
    W : (h, d) array
        Its weights as a matrix.
    correlations : Correlations, optional
        Of its inputs and the outputs wanted; without them the weights themselves are approximated.
    rank : int
    kernel : tuple of int
        Of a convolution.
    spatial : bool
        Along height and width, instead of the kernel first and 1 × 1 behind.
    metric : (h, h) array, optional
        S, positive definite; by default all outputs count alike. Only with correlations.
    """
    if metric is None or correlations is None:
        form = _factors(W, correlations, rank, kernel, spatial)
    else:
        # In outputs A y with Aᵀ A = S all of them count alike.
        A = scipy.linalg.cholesky(metric, check_finite=False)
        form = _factors(A @ W, seen_through(A, correlations), rank, kernel, spatial)
        flat = scipy.linalg.solve_triangular(A, form.outer.reshape(len(W), -1), check_finite=False)
        form = LowRank(flat.reshape(form.outer.shape), form.inner)
    M = form.dense().reshape(W.shape)
    if correlations is None:
        return FactoredLayer(M, None, float(np.square(W - M).sum() / (np.square(W).sum() or 1.0)), form)
    bias = correlations.bias(M)
    return FactoredLayer(M, bias, correlations.share_lost(M, bias), form)


def error_curve(
    W: Array,
    correlations: Correlations | None,
    most: int,
    *,
    kernel: Kernel = (),
    spatial: bool = False,
    metric: Array | None = None,
) -> Array:
    """(most + 1,) share of the outputs' energy, in the metric, that is lost at rank 0 … ``most``.

    Exact but for spatial factors: those of the problem in which the columns of the window are unrelated, all
    in the proportion that holds halfway.
    """
    if metric is not None and correlations is not None:
        A = scipy.linalg.cholesky(metric, check_finite=False)
        W, correlations = A @ W, seen_through(A, correlations)
    if not spatial:
        spectrum = plain_spectrum(W) if correlations is None else activation_spectrum(W, correlations)
        return spectrum.tails[: most + 1]
    size = kernel[0], kernel[1]
    if correlations is None:
        return plain_spatial(W, size).tails[: most + 1]
    start, half = spatial_spectrum(W, correlations, size), max(1, most // 2)
    exact = factor_layer(W, correlations, half, kernel=kernel, spatial=True).error
    return np.minimum(start.tails[: most + 1] * exact / max(float(start.tails[half]), 1e-12), 1.0)


def seen_through(A: Array, correlations: Correlations) -> Correlations:
    """Centred correlations of the same inputs with the outputs A y."""
    own = correlations.centered()
    yy = A @ own.yy @ A.T
    # Where only the diagonal of Σ y yᵀ is known this is none of anything, and nothing may be taken for still.
    np.fill_diagonal(yy, np.maximum(np.diag(yy), np.finfo(float).tiny))
    return replace(own, yx=A @ own.yx, yy=yy)


def _factors(
    W: Array, correlations: Correlations | None, rank: int, kernel: Kernel, spatial: bool
) -> LowRank:
    if spatial:
        return _spatial(W, correlations, rank, (kernel[0], kernel[1]))
    known = plain_spectrum(W, rank) if correlations is None else activation_spectrum(W, correlations, rank)
    form = known.factors(rank)
    h, c = len(W), W.shape[1] // int(np.prod(kernel))
    return LowRank(form.outer.reshape(h, -1, *[1] * len(kernel)), form.inner.reshape(-1, c, *kernel))


def _spatial(W: Array, correlations: Correlations | None, rank: int, kernel: tuple[int, int]) -> LowRank:
    if correlations is None:
        return as_kernels(plain_spatial(W, kernel).factors(rank), kernel)
    start = spatial_start(W, correlations, rank, kernel)
    return as_kernels(refitted(start, W, correlations, kernel), kernel)
