"""Optimal brain surgeon for one layer: which weights are kept, and their new values.

    min_M  ½ E‖y − M x‖² + ½ ε Σ_j R_jj ‖M_j − W_j‖²        M with a given number or pattern of zeros

from R = E[x xᵀ] and C = E[y xᵀ] (or y = W x). Everything runs in inputs of unit variance, where the problem
is ½⟨(M − V) A, M − V⟩ with A and the best dense weights V of ``layer_problem``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pysolve.correlations import Array, Correlations, Mask
from pysolve.errors import exactly_one, one_of, whole
from pysolve.layer.layer_fit import LayerFit
from pysolve.layer.layer_problem import ITERATIONS, LayerProblem, layer_problem, refit_rows
from pysolve.layer.masks import count_left, parse_pattern
from pysolve.layer.searches import LARGEST, Zeros, admm, greedy, sweep
from pysolve.solve.least_squares import Ridge

METHODS = ("auto", "admm", "greedy", "sweep")
SCOPES = ("layer", "row")

# Multiplications up to which "auto" tries elimination beside ADMM, and those of the final refit; one that
# would take more is cut short, and in single precision.
_GREEDY, _REFIT = 3e10, 3e11
# Iterations at least, from weights that suit their mask, and from others.
_FOUND, _GIVEN = 5, 25


@dataclass(frozen=True, eq=False, kw_only=True)
class PrunedLayer(LayerFit):
    """The fit of a layer with zeros.

    Parameters
    ----------
    mask : (h, d) bool array
        Weights that are kept; ``weight`` is zero elsewhere.
    method : str
        The search that chose the mask: "admm", "greedy" or "sweep", or "mask" where it was given.
    ridge : float
        ε.
    """

    mask: Mask = field(repr=False)
    method: str
    ridge: float

    @property
    def nonzeros(self) -> int:
        """Number of weights that are kept."""
        return int(np.count_nonzero(self.mask))


def obs_prune(
    W: npt.ArrayLike,
    r_xx: Correlations | npt.ArrayLike,
    r_yx: npt.ArrayLike | None = None,
    *,
    amount: float | None = None,
    count: int | None = None,
    pattern: str | None = None,
    mask: npt.ArrayLike | None = None,
    scope: str = "layer",
    method: str = "auto",
    ridge: Ridge = "auto",
) -> PrunedLayer:
    """Zeros for a layer, compensated by its other weights.

    Solves  min_M  ½ E‖y − M x‖² + ½ ε Σ_j R_jj ‖M_j − W_j‖²  over M with a given number or pattern of zeros:
    which zeros by search, the weights for them exactly.

    Parameters
    ----------
    W : (h, d) array
        The layer's weights; a convolution's as ``weight.flatten(1)``.
    r_xx : Correlations, or (d, d) array or CPU tensor
        Correlations of the layer's inputs with the outputs wanted, centred here, for the bias is free; or
        E[x xᵀ], taken as it is.
    r_yx : (h, d) array or CPU tensor, optional
        E[y xᵀ], beside E[x xᵀ]: y counts as far as x explains it. By default y = W x.
    amount : float
        Share of the weights to remove, in [0, 1). Give one of ``amount``, ``count``, ``pattern``, ``mask``.
    count : int
        Number of weights to keep.
    pattern : str
        As "2:4": of every 4 consecutive inputs of an output, 2 are kept.
    mask : (h, d) bool array
        The weights to keep.
    scope : "layer" or "row"
        Whether the share is that of the layer, or of every output.
    method : "auto", "admm", "greedy" or "sweep"
        "admm": alternating directions with rising penalties, the lowest errors per second; "greedy": exact
        elimination of one weight after the other in every row, then the best sizes of the rows (amount or
        count of a layer only); "sweep": once over the columns, SparseGPT's update, fastest. "auto": admm,
        and greedy as well where that is cheap, whichever is better; beyond about 5,800 × 5,800 sweep.
    ridge : float or "auto"
        ε of the ridge towards W, relative to each input's variance; "auto" is 1e-4, d / 10 n for
        correlations of n samples where that is more, and more where R demands it.

    Returns
    -------
    PrunedLayer

    Raises
    ------
    ValueError, TypeError
        For matrices that do not fit, unknown words, or not exactly one number, pattern or mask.

    References
    ----------
    B. Hassibi, D. Stork, Second order derivatives for network pruning: optimal brain surgeon, 1993.
    E. Frantar, D. Alistarh, SparseGPT, 2023 (the sweep). X. Meng et al., ALPS, 2024 (ADMM).

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> rng = np.random.default_rng(0)
    >>> x, W = rng.standard_normal((1000, 20)), rng.standard_normal((3, 20))
    >>> found = ps.obs_prune(W, x.T @ x / 1000, amount=0.5)
    >>> int((found.weight != 0).sum())
    30
    """
    _check(amount, count, pattern, mask, scope, method)
    problem = layer_problem(W, r_xx, r_yx, ridge=ridge)
    if mask is None and not problem.W.size:
        # LAPACK complains about matrices of nothing.
        mask = np.ones(problem.W.shape, bool)
    if mask is not None:
        return _pruned(problem, "mask", np.asarray(mask), problem.W)
    h, d = problem.W.shape
    left = whole("count", count, 0, h * d) if count is not None else count_left(amount or 0.0, h * d)
    zeros = Zeros(
        left // max(h, 1) if scope == "row" else left,
        scope == "row",
        parse_pattern(pattern) if pattern is not None else None,
    )
    found = [
        _pruned(problem, name, *_SEARCHES[name](problem, zeros))
        for name in _methods(method, h, d, whole=pattern is None and scope == "layer")
    ]
    return min(found, key=lambda one: one.error)


_SEARCHES = {"admm": admm, "greedy": greedy, "sweep": sweep}


def _pruned(problem: LayerProblem, method: str, mask: Mask, start: Array) -> PrunedLayer:
    effort, found = float(len(mask)) * len(problem.R) ** 2, start is not problem.W
    single, iterations = effort * ITERATIONS > _REFIT, ITERATIONS
    if single:
        # Half the time each in single precision, so twice as many.
        iterations = int(np.clip(2 * _REFIT / effort, _FOUND if found else _GIVEN, ITERATIONS))
    M = refit_rows(problem, mask, start, overwrite=found, single=single, iterations=iterations)
    return PrunedLayer(M, problem.bias(M), problem.error(M), mask=mask, method=method, ridge=problem.ridge)


def _methods(method: str, h: int, d: int, *, whole: bool) -> tuple[str, ...]:
    """The searches to try; ``whole``: for a number of weights of the whole layer."""
    if method != "auto":
        return (method,)
    if 2.0 * h * d * d > LARGEST:
        return ("sweep",)
    return ("admm", "greedy") if whole and h * d**3 / 3 <= _GREEDY else ("admm",)


def _check(
    amount: float | None, count: int | None, pattern: str | None, mask: object, scope: str, method: str
) -> None:
    one_of("method", method, METHODS)
    one_of("scope", scope, SCOPES)
    exactly_one(amount=amount, count=count, pattern=pattern, mask=mask)
    if amount is not None and not 0 <= amount < 1:
        raise ValueError(f"amount must be in [0, 1), got {amount}.")
    if method == "greedy" and (scope == "row" or pattern is not None):
        raise ValueError('method="greedy" takes an amount or a count of the whole layer; use "admm".')
