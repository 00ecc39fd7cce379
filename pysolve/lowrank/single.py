"""``reduced_rank``: one layer as two smaller ones, from its weights and what is known of its inputs."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np

from pysolve.correlations import Array, Correlations
from pysolve.lowrank.layer import FactoredLayer, error_curve, factor_layer
from pysolve.lowrank.ranks import rank_keeping
from pysolve.problem import checked_matrix

# Samples that E[x xᵀ] alone is taken to come from: enough for the least pull to the old weights.
_MANY = 10**9


def reduced_rank(
    W: Any,
    statistics: Any = None,
    *,
    rank: Any = None,
    energy: float | None = None,
    metric: Any = None,
) -> FactoredLayer:
    """The best layer of low rank, exactly.

    Solves  min E (y − M x − b)ᵀ S (y − M x − b) + ε Σ_j R_jj (M_j − W_j)ᵀ S (M_j − W_j)  over M of rank r, or
    without statistics, min ‖W − M‖_F, the truncated singular value decomposition.

    Parameters
    ----------
    W : (h, d) array or CPU tensor
        The layer's weights; a convolution's as ``weight.flatten(1)``.
    statistics : Correlations, or (d, d) array or CPU tensor
        What the layer reads and should output: centred here, for the bias is free. Its y may be the outputs
        of another network. Or E[x xᵀ] alone, taken as it is, with y = W x. It may be singular.
    rank : int
        r. Give this or ``energy``.
    energy : float
        Share in (0, 1] of the outputs' energy, in the metric, to keep; without statistics of ‖W‖².
    metric : (h, h) array, optional
        S, positive definite: what an error at the outputs means. By default all count alike.

    Returns
    -------
    FactoredLayer
        ``form.outer`` (h, r) and ``form.inner`` (r, d) are the two layers' weights.

    References
    ----------
    A. J. Izenman, Reduced-rank regression for the multivariate linear model, 1975.
    """
    W = checked_matrix("W", W)
    known = _correlations(W, statistics)
    S = None if metric is None else checked_matrix("metric", metric)
    if (rank is None) == (energy is None):
        raise ValueError(f"give either rank or energy, got {rank=} and {energy=}.")
    if S is not None and (known is None or S.shape != (len(W), len(W))):
        raise ValueError(f"a metric of shape {(len(W), len(W))} goes with statistics, got shape {S.shape}.")
    most = min(W.shape)
    if energy is not None:
        if not 0 < energy <= 1:
            raise ValueError(f"energy must be a share in (0, 1], got {energy}.")
        rank = min(most, rank_keeping(error_curve(W, known, most, metric=S), energy))
    if isinstance(rank, bool) or not isinstance(rank, Integral) or not 1 <= int(rank) <= most:
        raise ValueError(f"rank must be a whole number within 1 … {most} for W of {W.shape}, got {rank!r}.")
    found = factor_layer(W, known, int(rank), metric=S)
    return found if isinstance(statistics, Correlations) else replace(found, bias=None)


def _correlations(W: Array, statistics: Any) -> Correlations | None:
    if statistics is None:
        return None
    d = W.shape[1]
    if isinstance(statistics, Correlations):
        if statistics.yx.shape != W.shape:
            raise ValueError(f"W is {W.shape}, but the statistics are of a layer of {statistics.yx.shape}.")
        return statistics
    R = checked_matrix("r_xx", statistics)
    if R.shape != (d, d):
        raise ValueError(f"E[x xᵀ] must be of shape {(d, d)} for W of {W.shape}, got {R.shape}.")
    xx, yx = _MANY * R, _MANY * (W @ R)
    return Correlations(xx, yx, yx @ W.T, _MANY, np.zeros(d), np.zeros(len(W)))
