"""``reduced_rank``: one layer factored into two, by its weights alone or by the error of its outputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pysolve.correlations import Array, Correlations, product
from pysolve.errors import exactly_one, whole
from pysolve.forms import LowRank
from pysolve.layer.layer_fit import LayerFit
from pysolve.layer.layer_problem import check_alone, checked_layer, explained
from pysolve.layer.spatial import as_kernels, better_start, plain_spatial, refitted, spatial_spectrum
from pysolve.layer.spectrum import Spectrum, activation_spectrum, plain_spectrum
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

    Solves  min E (y − M x − b)ᵀ S (y − M x − b) + ε Σ_j v_j (M_j − W_j)ᵀ S (M_j − W_j)  over M of rank r, v
    the variances of the inputs or a hundredth of the median one if that is more; or without ``r_xx``,
    min ‖W − M‖_F, the truncated singular value decomposition.

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

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> rng = np.random.default_rng(0)
    >>> x, W = rng.standard_normal((1000, 20)), rng.standard_normal((30, 20))
    >>> found = ps.reduced_rank(W, x.T @ x / 1000, rank=5)
    >>> found.form.outer.shape, found.form.inner.shape
    ((30, 5), (5, 20))
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


@dataclass(frozen=True, eq=False)
class Decomposed:
    """A layer that was decomposed once, for its factors of every rank up to some largest one.

    Parameters
    ----------
    W : (h, d) array
    correlations : Correlations, optional
    spectra : tuple of Spectrum
        Of the outputs as the metric sees them; of spatial factors, what to start from: one that needs no data
        comes last.
    kernel, spatial, metric
        As ``factor_layer`` takes them.
    """

    W: Array
    correlations: Correlations | None
    spectra: tuple[Spectrum, ...]
    kernel: Kernel = ()
    spatial: bool = False
    metric: Array | None = None

    def layer(self, rank: int) -> FactoredLayer:
        """The best layer of a rank."""
        known, form = self.correlations, self._form(rank)
        M = form.dense().reshape(self.W.shape)
        if known is None:
            lost = np.square(self.W - M).sum() / (np.square(self.W).sum() or 1.0)
            return FactoredLayer(M, None, float(lost), form)
        bias = known.bias(M)
        return FactoredLayer(M, bias, known.share_lost(M, bias), form)

    def lost(self, most: int) -> Array:
        """(most + 1,) share of the outputs' energy, in the metric, that is lost at rank 0 … ``most``.

        Exact but for spatial factors, whose errors are those for unrelated columns of the window, all in the
        proportion that holds halfway.
        """
        tails = self.spectra[0].tails[: most + 1]
        if not self.spatial or self.correlations is None:
            return tails
        W, known = _weighed(self.W, self.correlations, _root(self.correlations, self.metric))
        half = max(1, most // 2)
        exact = replace(self, W=W, correlations=known, metric=None).layer(half).error
        return np.minimum(tails * exact / max(float(tails[half]), 1e-12), 1.0)

    def _form(self, rank: int) -> LowRank:
        """Factors in the shapes of the two layers' weights."""
        A = _root(self.correlations, self.metric)
        if self.spatial:
            form = as_kernels(self._spatial(rank, A), (self.kernel[0], self.kernel[1]))
        else:
            form, taps = self.spectra[0].factors(rank), int(np.prod(self.kernel))
            outer = form.outer.reshape(len(self.W), -1, *[1] * len(self.kernel))
            form = LowRank(outer, form.inner.reshape(-1, self.W.shape[1] // taps, *self.kernel))
        if A is None:
            return form
        flat = scipy.linalg.solve_triangular(A, form.outer.reshape(len(A), -1), check_finite=False)
        return LowRank(flat.reshape(form.outer.shape), form.inner)

    def _spatial(self, rank: int, A: Array | None) -> LowRank:
        starts, kernel = [one.factors(rank) for one in self.spectra], (self.kernel[0], self.kernel[1])
        W, known = _weighed(self.W, self.correlations, A)
        if known is None:
            return starts[0]
        return refitted(better_start(starts, W, known, kernel), W, known, kernel)


def decompose(
    W: Array,
    correlations: Correlations | None,
    rank: int | None = None,
    *,
    kernel: Kernel = (),
    spatial: bool = False,
    metric: Array | None = None,
) -> Decomposed:
    """Decompose a layer; ``rank``, the largest that will be needed, saves time on large ones."""
    seen, known = _weighed(W, correlations, _root(correlations, metric))
    spectra: tuple[Spectrum, ...]
    if spatial:
        size = kernel[0], kernel[1]
        spectra = (plain_spatial(seen, size),)
        if known is not None:
            spectra = (spatial_spectrum(seen, known, size), *spectra)
    elif known is None:
        spectra = (plain_spectrum(seen, rank),)
    else:
        spectra = (activation_spectrum(seen, known, rank),)
    return Decomposed(W, correlations, spectra, kernel, spatial, metric)


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
    found = decompose(W, correlations, rank, kernel=kernel, spatial=spatial, metric=metric)
    return found.layer(rank)


def error_curve(
    W: Array,
    correlations: Correlations | None,
    most: int,
    *,
    kernel: Kernel = (),
    spatial: bool = False,
    metric: Array | None = None,
) -> Array:
    """(most + 1,) share of the outputs' energy that is lost at rank 0 … ``most``: ``Decomposed.lost``."""
    return decompose(W, correlations, kernel=kernel, spatial=spatial, metric=metric).lost(most)


def seen_through(A: Array, W: Array, correlations: Correlations) -> Correlations:
    """Centred correlations of the same inputs with outputs A y; without Σ y yᵀ in full, as if  y = W x."""
    own = correlations.centered()
    yx = product(A, own.yx)
    yy = product(product(A, own.yy), A.T) if own.yy.ndim == 2 else np.diag(np.einsum("ij,ij->i", yx, A @ W))
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
    yx = product(W, R) if C is None else C
    yy = product(yx, W.T) if C is None else explained(R, C)
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
    inner = product(known.directions.T, known.matrix)
    gains = ((2 * product(known.directions.T, own.r_yx) - product(inner, own.r_xx)) * inner).sum(1)
    return 1 - np.concatenate([[0.0], np.cumsum(gains)]) / (own.energy or 1.0)


def _root(correlations: Correlations | None, metric: Array | None) -> Array | None:
    """A with Aᵀ A = S: outputs A y count alike."""
    known = metric is not None and correlations is not None
    return np.asarray(scipy.linalg.cholesky(metric, check_finite=False)) if known else None


def _weighed(
    W: Array, correlations: Correlations | None, A: Array | None
) -> tuple[Array, Correlations | None]:
    """Weights and correlations of outputs A y."""
    if A is None or correlations is None:
        return W, correlations
    return A @ W, seen_through(A, W, correlations)


def _checked_metric(metric: npt.ArrayLike, h: int, known: Correlations | None) -> Array:
    S = checked_correlations("metric", metric)
    if known is None or S.shape != (h, h):
        raise ValueError(f"a metric of shape {(h, h)} goes with r_xx, got shape {S.shape}.")
    try:
        scipy.linalg.cholesky(S, check_finite=False)
    except scipy.linalg.LinAlgError as error:
        raise ValueError(f"metric must be positive definite: {error}.") from error
    return S
