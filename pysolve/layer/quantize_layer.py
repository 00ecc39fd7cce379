"""``quantize_layer``: the weights of one layer in few bits, from matrices."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real

import numpy as np
import numpy.typing as npt

from pysolve.correlations import AnyArray, Array, Correlations
from pysolve.errors import check_flags, one_of, whole
from pysolve.forms import QuantForm
from pysolve.layer.codebooks import share_values, spaced_values
from pysolve.layer.grids import fit_grid
from pysolve.layer.layer_fit import LayerFit
from pysolve.layer.layer_problem import check_alone, layer_problem
from pysolve.layer.masks import checked_mask
from pysolve.layer.rounding import Codes, Levels, Target, round_best, round_nearest, target_of
from pysolve.solve.least_squares import Ridge
from pysolve.solve.problem import checked_matrix

SCHEMES = ("codebook", "int", "ternary")
METHODS = ("feedback", "nearest")

# Rounds of feedback, passes of descent in each, and those for layers of more multiplications h d² than
# _LARGE. For LeNet-5 and ResNet-20 at 2 bits a second round takes 2 to 6 % from the error, four 4 to 11 %;
# of the objective with bits in it, all further rounds take 0.1 to 4 %.
_ROUNDS, _PASSES = 4, 4
_FEWER, _LARGE = (1, 1), 2e9


@dataclass(frozen=True, eq=False)
class QuantizedLayer(LayerFit):
    """The fit of a layer of few values; ``form`` holds the codes and the values, in single precision."""

    form: QuantForm = field(repr=False)

    @property
    def codes(self) -> AnyArray:
        """(h, d) integers."""
        return self.form.codes


def quantize_layer(
    W: npt.ArrayLike,
    r_xx: Correlations | npt.ArrayLike | None = None,
    r_yx: npt.ArrayLike | None = None,
    *,
    bits: int = 4,
    scheme: str = "codebook",
    mask: npt.ArrayLike | None = None,
    symmetric: bool = True,
    group: int | None = None,
    method: str = "feedback",
    lam: float | None = None,
    outputs: npt.ArrayLike | None = None,
    rounds: int | None = None,
    ridge: Ridge = "auto",
) -> QuantizedLayer:
    """Weights of few different values, whose errors compensate each other.

    Solves  min_M  ½ E‖y − M x‖² + ½ ε Σ_j R_jj ‖M_j − W_j‖²  over M whose entries are among 2^bits values,
    and over those values, alternately: neither is found in general, but from the first rounding on, the error
    never rises. Without ``r_xx``, min ‖W − M‖.

    With ``lam``, + lam · Σ_ij −log₂ p(M_ij), p the share of the weights that have a value: the bits that
    entropy coding takes for them. So the zeros and the number of values follow from the price of a bit.

    Parameters
    ----------
    W : (h, d) array or CPU tensor
        The layer's weights; a convolution's as ``weight.flatten(1)``.
    r_xx, r_yx : Correlations, or (d, d) and (h, d) arrays or CPU tensors, optional
        As in ``obs_prune``; r_xx may be singular.
    bits : int
        Of a code: 1 … 8, or 2 … 8 for "int". Not for "ternary".
    scheme : "codebook", "int" or "ternary"
        2^bits values that the layer shares; evenly spaced ones for every output; or two and zero.
    mask : (h, d) bool array, optional
        Weights that may differ from zero. Of a codebook's values the first one is zero then.
    symmetric : bool
        "int": zero is code 0; else the values span least to greatest weight.
    group : int, optional
        "int": number of consecutive inputs that share a scale; all of an output by default.
    method : "feedback" or "nearest"
        "nearest": every weight by itself, as a baseline.
    lam : float, optional
        "codebook": price of a bit, in units of the objective; the values begin as multiples of a step, zero
        among them, and there are at most 2^bits.
    outputs : (h,) array, optional
        "codebook": weight of the square error of each output, above zero; 1 by default.
    rounds : int, optional
        Rounds of feedback and descent; by default 4 where they are quick, else 1, and with ``lam``.
    ridge : float or "auto"
        ε, as in ``obs_prune``.

    Returns
    -------
    QuantizedLayer

    Raises
    ------
    ValueError, TypeError
        For matrices that do not fit, unknown words, or numbers out of range.

    References
    ----------
    E. Frantar et al., GPTQ, 2023. S. Han et al., Deep compression, 2016.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> rng = np.random.default_rng(0)
    >>> x, W = rng.standard_normal((1000, 20)), rng.standard_normal((3, 20))
    >>> found = ps.quantize_layer(W, x.T @ x / 1000, bits=2)
    >>> len(np.unique(found.form.dense()))
    4
    """
    W = checked_matrix("W", W)
    check_flags(symmetric=symmetric)
    _check(scheme, method, bits, group, rounds, lam, outputs)
    rows = None if outputs is None else _checked_rows(outputs, len(W))
    keep = None if mask is None else checked_mask(mask, W.shape)
    check_alone(r_xx, r_yx)
    if np.abs(W).max(initial=0.0) > np.finfo(np.float32).max:
        raise ValueError(
            "W has entries beyond single precision, in which values are stored; scale the layer."
        )
    problem = None if r_xx is None else layer_problem(W, r_xx, r_yx, ridge=ridge)
    if problem is None:
        target = Target(W if keep is None else np.where(keep, W, 0.0), None, keep, rows)
    else:
        target = target_of(problem, keep, rows)
    levels, codes = _fitted(target, scheme, int(bits), symmetric, group, method, rounds, lam)
    form = levels.form(codes)
    M = form.dense().astype(np.float64)
    if problem is None:
        return QuantizedLayer(M, None, float(np.square(W - M).sum() / (np.square(W).sum() or 1.0)), form)
    return QuantizedLayer(M, problem.bias(M), problem.error(M), form)


def _fitted(
    target: Target,
    scheme: str,
    bits: int,
    symmetric: bool,
    group: int | None,
    method: str,
    rounds: int | None,
    lam: float | None,
) -> tuple[Levels, Codes]:
    V, weights = target.V, target.diagonal
    levels: Levels
    if scheme == "int":
        levels = fit_grid(V, bits, symmetric=symmetric, group=group, weights=weights)
    elif lam is not None:
        levels = spaced_values(target, 1 << bits, lam)
    else:
        ternary = scheme == "ternary"
        size = 3 if ternary else 1 << bits
        levels = share_values(V, size, mask=target.mask, zero=ternary, weights=weights)
    if method == "nearest" or not V.size:
        return levels, round_nearest(target, levels)
    large = target.A is not None and V.size * float(V.shape[1]) > _LARGE
    most, passes = _FEWER if large else (1 if lam else _ROUNDS, _PASSES)
    return round_best(target, levels, most if rounds is None else rounds, passes)


def _check(
    scheme: str, method: str, bits: object, group: object, rounds: object, lam: object, outputs: object
) -> None:
    one_of("scheme", scheme, SCHEMES)
    one_of("method", method, METHODS)
    whole(f'bits for scheme="{scheme}"', bits, 2 if scheme == "int" else 1, 8)
    for name, value in (("group", group), ("rounds", rounds)):
        if value is not None:
            whole(name, value)
    if scheme != "codebook" and not (lam is None and outputs is None):
        raise ValueError(f'lam and outputs are for scheme="codebook", got scheme="{scheme}".')
    if lam is not None and not (isinstance(lam, Real) and 0 < float(lam) < np.inf):
        raise ValueError(f"lam must be a positive number, got {lam!r}.")


def _checked_rows(outputs: npt.ArrayLike, h: int) -> Array:
    rows = np.asarray(outputs, np.float64)
    if rows.shape != (h,) or not np.all(np.isfinite(rows) & (rows > 0)):
        raise ValueError(f"outputs must be {h} positive numbers, got an array of shape {rows.shape}.")
    return rows
