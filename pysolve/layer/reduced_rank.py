"""``reduced_rank``: one layer factored into two, by its weights alone or by the error of its outputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pysolve.correlations import Array, Correlations
from pysolve.errors import exactly_one, whole
from pysolve.forms import LowRank
from pysolve.layer.layer_fit import LayerFit
from pysolve.layer.layer_problem import check_alone, checked_layer, explained
from pysolve.layer.spatial import as_kernels, plain_spatial, refitted, spatial_spectrum, spatial_start
from pysolve.layer.spectrum import activation_spectrum, plain_spectrum
from pysolve.solve.problem import checked_correlations, checked_matrix

Kernel = tuple[int, ...]

# Samples that E[x xᵀ] without a count is taken to come from: enough for the least ridge towards W.
_MANY = 10**9


@dataclass(frozen=True, eq=False)
class FactoredLayer(LayerFit):
    """The fit of a layer of low rank; ``form`` are its factors, in the shapes of the two layers' weights."""

    form: LowRank = field(repr=False)


def reduced_rank(
    W: npt.ArrayLike,
    r_xx: Correlations | npt.ArrayLike | None = None,
    r_yx: npt.ArrayLike | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    metric: npt.ArrayLike | None = None,
) -> FactoredLayer:
    """The best layer of low rank, exactly.

    Solves  min E (y − M x − b)ᵀ S (y − M x − b) + ε Σ_j R_jj (M_j − W_j)ᵀ S (M_j − W_j)  over M of rank r, or
    without ``r_xx``, min ‖W − M‖_F, the truncated singular value decomposition.

    Parameters
    ----------
    W : (h, d) array or CPU tensor
        The layer's weights; a convolution's as ``weight.flatten(1)``.
    r_xx, r_yx : Correlations, or (d, d) and (h, d) arrays or CPU tensors, optional
        As in ``obs_prune``; r_xx may be singular.
    rank : int
        r. Give this or ``energy``.
    energy : float
        Share in (0, 1] of the outputs' energy, in the metric, to keep; without ``r_xx`` of ‖W‖². The smallest
        rank that keeps as much, or the largest where noise in the outputs leaves none.
    metric : (h, h) array, optional
        S, positive definite: the weight of errors at the outputs. By default all count alike.

    Returns
    -------
    FactoredLayer
        ``form.outer`` (h, r) and ``form.inner`` (r, d) are the two layers' weights.

    Raises
    ------
    ValueError, TypeError
        For matrices that do not fit, or not exactly one of rank and energy within its range.

    References
    ----------
    A. J. Izenman, Reduced-rank regression for the multivariate linear model, 1975.
    """
    W = checked_matrix("W", W)
    known = _correlations(W, r_xx, r_yx)
    S = None if metric is None else _checked_metric(metric, len(W), known)
    exactly_one(rank=rank, energy=energy)
    most = min(W.shape)
    if energy is not None:
        if not 0 < energy <= 1:
            raise ValueError(f"energy must be a share in (0, 1], got {energy}.")
        rank = min(most, rank_keeping(_lost(W, known, S), energy))
    found = factor_layer(W, known, whole("rank, up to the smaller side of W,", rank, 1, most), metric=S)
    return found if isinstance(r_xx, Correlations) else replace(found, bias=None)


def factor_layer(
    W: Array,
    correlations: Correlations | None,
    rank: int,
    *,
    kernel: Kernel = (),
    spatial: bool = False,
    metric: Array | None = None,
) -> FactoredLayer:
    """The best layer of a rank:  min E (y − M x − b)ᵀ S (y − M x − b); without correlations, min ‖W − M‖.

    ``kernel`` is the size of a convolution's kernel; ``spatial`` factors along its height and width, instead
    of the kernel first and 1 × 1 behind. ``metric`` is S, which goes with correlations.
    """
    if metric is None or correlations is None:
        form = _factors(W, correlations, rank, kernel, spatial)
    else:
        # In outputs A y with Aᵀ A = S all of them count alike.
        A = scipy.linalg.cholesky(metric, check_finite=False)
        form = _factors(A @ W, seen_through(A, W, correlations), rank, kernel, spatial)
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

    Exact but for spatial factors, whose errors are those for unrelated columns of the window, all in the
    proportion that holds halfway.
    """
    if metric is not None and correlations is not None:
        A = scipy.linalg.cholesky(metric, check_finite=False)
        W, correlations = A @ W, seen_through(A, W, correlations)
    if not spatial:
        spectrum = plain_spectrum(W) if correlations is None else activation_spectrum(W, correlations)
        return spectrum.tails[: most + 1]
    size = kernel[0], kernel[1]
    if correlations is None:
        return plain_spatial(W, size).tails[: most + 1]
    start, half = spatial_spectrum(W, correlations, size), max(1, most // 2)
    exact = factor_layer(W, correlations, half, kernel=kernel, spatial=True).error
    return np.minimum(start.tails[: most + 1] * exact / max(float(start.tails[half]), 1e-12), 1.0)


def seen_through(A: Array, W: Array, correlations: Correlations) -> Correlations:
    """Centred correlations of the same inputs with outputs A y; without Σ y yᵀ in full, as if  y = W x."""
    own = correlations.centered()
    yx = A @ own.yx
    yy = A @ own.yy @ A.T if own.yy.ndim == 2 else np.diag(np.einsum("ij,ij->i", yx, A @ W))
    # Targets that have moved are no outputs of W: none may be taken for constant.
    np.fill_diagonal(yy, np.maximum(np.diag(yy), np.finfo(float).tiny))
    return replace(own, yx=yx, yy=yy)


def rank_keeping(error: Array, energy: float) -> int:
    """The smallest rank of at least 1 whose error is at most 1 − energy; one beyond the last when none is."""
    # Errors as small as rounding count as none.
    enough = np.flatnonzero(error <= max(1 - energy, 1e-12))
    return max(1, int(enough[0])) if len(enough) else len(error)


def _correlations(
    W: Array, r_xx: Correlations | npt.ArrayLike | None, r_yx: npt.ArrayLike | None
) -> Correlations | None:
    """Correlations of the layer with weights W, also from matrices alone."""
    check_alone(r_xx, r_yx)
    if r_xx is None:
        return None
    R, C = checked_layer(W, r_xx, r_yx)
    if isinstance(r_xx, Correlations):
        return r_xx
    yx = W @ R if C is None else C
    yy = yx @ W.T if C is None else explained(R, C)
    zero = np.zeros(W.shape[1]), np.zeros(len(W))
    return Correlations(_MANY * R, _MANY * yx, _MANY * yy, _MANY, *zero)


def _lost(W: Array, correlations: Correlations | None, metric: Array | None) -> Array:
    """(ranks + 1,) share of the outputs' energy, in the metric, that the layer of each rank loses.

    Unlike the curve, which is of the energy that any weights explain, and has the ridge in it.
    """
    if correlations is None:
        return plain_spectrum(W).tails
    if metric is not None:
        A = scipy.linalg.cholesky(metric, check_finite=False)
        W, correlations = A @ W, seen_through(A, W, correlations)
    known, own = activation_spectrum(W, correlations), correlations.centered()
    inner = known.directions.T @ known.matrix
    gains = ((2 * known.directions.T @ own.r_yx - inner @ own.r_xx) * inner).sum(1)
    return 1 - np.concatenate([[0.0], np.cumsum(gains)]) / (own.energy or 1.0)


def _checked_metric(metric: npt.ArrayLike, h: int, known: Correlations | None) -> Array:
    S = checked_correlations("metric", metric)
    if known is None or S.shape != (h, h):
        raise ValueError(f"a metric of shape {(h, h)} goes with r_xx, got shape {S.shape}.")
    try:
        scipy.linalg.cholesky(S, check_finite=False)
    except scipy.linalg.LinAlgError as error:
        raise ValueError(f"metric must be positive definite: {error}.") from error
    return S


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
