"""The problem that the solvers solve, checked once, here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg.lapack

from pysolve.correlations import Array, Correlations

# Negative eigenvalues up to these shares of the trace (of R at unit diagonal) pass as rounding: in float64,
# and in sums gathered in float32.
ROUNDING_SHARES = (1e-14, 1e-12, 1e-10, 1e-8, 1e-7)


@dataclass(frozen=True, eq=False)
class Problem:
    """min_M  Σ_r ( ½⟨M_r R_r, M_r⟩ − ⟨C_r, M_r⟩ ) + lam Σ_g w_g ‖M_g‖_F, one or several readers r.

    The readers read the same d inputs and share their groups: ‖M_g‖ runs over the columns of group g in
    every M_r.

    Parameters
    ----------
    xx : tuple of (d, d) arrays
        R_r = E[x xᵀ] of each reader's inputs; symmetric positive semi-definite.
    yx : tuple of (h_r, d) arrays
        C_r = E[y xᵀ].
    group_size : int
        Groups are consecutive blocks of this many inputs.
    weights : (groups,) array
        w_g ≥ 0; a group of weight 0 is not penalised.

    Raises
    ------
    ValueError, TypeError
        Shapes that do not fit, entries that are not finite, a matrix that is not symmetric positive
        semi-definite.
    """

    xx: tuple[Array, ...]
    yx: tuple[Array, ...]
    group_size: int
    weights: Array

    @property
    def inputs(self) -> int:
        return len(self.xx[0])

    @property
    def groups(self) -> int:
        return self.inputs // self.group_size

    @property
    def penalised(self) -> npt.NDArray[np.bool_]:
        """Mask over the groups."""
        return self.weights > 0


def as_problem(problems: Any, group_size: int | None = None, weights: npt.ArrayLike | None = None) -> Problem:
    """A checked Problem from what users have.

    ``problems`` is a Correlations, a pair (r_xx, r_yx) of arrays or CPU tensors, a list of these (readers
    that share their groups), or already a Problem.
    """
    if isinstance(problems, Problem):
        return problems
    readers = list(problems) if _is_several(problems) else [problems]
    if not readers:
        raise ValueError("expected at least one problem, got an empty list.")
    pairs = [(p.r_xx, p.r_yx) if isinstance(p, Correlations) else _pair(p) for p in readers]
    xx, yx = zip(*(_checked_reader(*pair) for pair in pairs), strict=True)
    d = len(xx[0])
    for r in xx[1:]:
        if len(r) != d:
            raise ValueError(f"readers must share their inputs, got {d} and {len(r)} inputs.")
    sizes = {p.group_size for p in readers if isinstance(p, Correlations)}
    if group_size is None:
        if len(sizes) > 1:
            raise ValueError(f"readers must share their groups, got group sizes {sorted(sizes)}.")
        group_size = sizes.pop() if sizes else 1
    if isinstance(group_size, bool) or not isinstance(group_size, int | np.integer):
        raise TypeError(f"group_size must be an integer, got {type(group_size).__name__}.")
    if group_size < 1 or d % group_size:
        raise ValueError(f"group_size must divide the {d} inputs, got {group_size}.")
    return Problem(xx, yx, int(group_size), checked_weights(weights, d // int(group_size)))


def problem_of(
    r_xx: Any, r_yx: Any, group_size: int | None = None, weights: npt.ArrayLike | None = None
) -> Problem:
    """A checked Problem from the arguments (r_xx, r_yx) of public functions.

    Two matrices; or two lists of them, one of each a reader; or in ``r_xx`` alone whatever ``as_problem``
    takes.
    """
    if r_yx is None:
        return as_problem(r_xx, group_size, weights)
    if is_list_of_matrices(r_xx):
        return as_problem(list(zip(r_xx, r_yx, strict=True)), group_size, weights)
    return as_problem((r_xx, r_yx), group_size, weights)


def is_list_of_matrices(value: Any) -> bool:
    """Whether it is one matrix a reader, not one matrix."""
    return isinstance(value, list | tuple) and len(value) > 0 and np.ndim(value[0]) == 2


def check_lam(lam: float) -> float:
    """``lam`` as a float; ValueError unless it is positive and finite."""
    try:
        value = float(lam)
    except (TypeError, ValueError):
        raise TypeError(f"lam must be a number, got {lam!r}.") from None
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"lam must be positive and finite, got {lam}. For no penalty at all, use debias.")
    return value


def checked_matrix(name: str, value: Any) -> Array:
    """``value`` (array, nested list or CPU tensor) as a finite float64 matrix; copied only if it must be."""
    if hasattr(value, "detach"):
        value = value.detach()
        if value.device.type != "cpu":
            raise TypeError(f"{name} is on {value.device}; pass {name}.cpu().")
    matrix = np.asarray(value)
    if matrix.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {matrix.dtype}.")
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got an array of shape {matrix.shape}.")
    matrix = matrix.astype(np.float64, copy=False)
    bad = matrix.size - np.count_nonzero(np.isfinite(matrix))
    if bad:
        raise ValueError(
            f"{name} has {bad} entries that are not finite; look for NaN or infinity in the data."
        )
    return matrix


def checked_weights(weights: npt.ArrayLike | None, groups: int) -> Array:
    """One finite weight ≥ 0 a group; all 1 when not given."""
    if weights is None:
        return np.ones(groups)
    array = np.array(weights, dtype=np.float64)
    if array.shape != (groups,):
        raise ValueError(
            f"weights must hold one number for each of the {groups} groups, got shape {array.shape}."
        )
    if not np.all(np.isfinite(array)) or array.min() < 0:
        raise ValueError("weights must be finite and at least 0 (0: that group is not penalised).")
    return array


def half_trace(r_yy: Any) -> float:
    """½ E‖y‖² from E[y yᵀ], its diagonal, its trace, or nothing (0)."""
    if r_yy is None:
        return 0.0
    value = np.asarray(r_yy.detach() if hasattr(r_yy, "detach") else r_yy, dtype=np.float64)
    energy = float(np.trace(value) if value.ndim == 2 else value.sum())
    if not (np.isfinite(energy) and energy >= 0):
        raise ValueError(f"r_yy must have a finite trace of at least 0, got {energy}.")
    return 0.5 * energy


def _is_several(problems: Any) -> bool:
    if isinstance(problems, list):
        return True
    return isinstance(problems, tuple) and all(isinstance(p, Correlations | tuple) for p in problems)


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(
            f"a problem is a Correlations or a tuple (r_xx, r_yx), several are a list of those; "
            f"got {type(value).__name__}."
        )
    return value[0], value[1]


def _checked_reader(r_xx: Any, r_yx: Any) -> tuple[Array, Array]:
    xx, yx = checked_matrix("r_xx", r_xx), checked_matrix("r_yx", r_yx)
    d = len(xx)
    if xx.shape != (d, d) or d == 0:
        raise ValueError(f"r_xx must be square and not empty, got {xx.shape[0]} x {xx.shape[1]}.")
    if len(yx) == 0:
        raise ValueError("r_yx has no rows; a problem needs at least one output.")
    if yx.shape[1] != d:
        raise ValueError(
            f"r_yx has {yx.shape[1]} columns but r_xx is {d} x {d}; both must describe the same inputs. "
            "Were they gathered from the same layer?"
        )
    asymmetry = _asymmetry(xx)
    if asymmetry > 1e-6:
        raise ValueError(
            f"r_xx is not symmetric: mirrored entries differ by up to {asymmetry:.3g} of the largest."
        )
    if asymmetry > 1e-13:
        xx = (xx + xx.T) / 2
    xx = _semidefinite(xx)
    impossible = np.count_nonzero((np.diag(xx) == 0) & np.any(yx != 0, axis=0))
    if impossible:
        raise ValueError(
            f"r_yx is not zero for {impossible} inputs whose r_xx is zero; an input that is always 0 "
            "correlates with nothing. Were they gathered from the same data?"
        )
    return xx, yx


def _asymmetry(xx: Array) -> float:
    """Largest difference of an entry from its mirror, as a share of the largest entry."""
    # In strips, so that no temporary is large: fresh memory costs more than the arithmetic.
    strips = (slice(i, i + 128) for i in range(0, len(xx), 128))
    difference = max(float(np.abs(xx[rows] - xx[:, rows].T).max()) for rows in strips)
    return difference / max(float(xx.max()), -float(xx.min())) if difference else 0.0


def _semidefinite(xx: Array) -> Array:
    """xx, its diagonal raised by a share as small as what rounding in float32 takes; ValueError beyond."""
    diagonal, d = np.diag(xx), len(xx)
    if diagonal.min() < -1e-9 * diagonal.max():
        raise ValueError(f"r_xx has a negative diagonal entry, {diagonal.min():.3g}; E[x xᵀ] cannot.")
    unit = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    for share in ROUNDING_SHARES:
        scaled = xx / unit[:, None]
        scaled /= unit
        if _factors(scaled, share * d):
            # At the first, smallest share the factorisation may only have met its own rounding.
            return xx if share == ROUNDING_SHARES[0] else xx + np.diag(share * d * diagonal)
    raise ValueError(
        "r_xx is not positive semi-definite, so it is no correlation matrix E[x xᵀ]. "
        "Was a centred or approximate matrix computed with too few digits?"
    )


def _factors(matrix: Array, shift: float) -> bool:
    """Whether matrix + shift is positive definite; overwrites the matrix."""
    matrix.ravel()[:: len(matrix) + 1] += shift
    # LAPACK wants columns contiguous: the transpose of a symmetric matrix is itself, and no copy.
    _, info = scipy.linalg.lapack.dpotrf(matrix.T, lower=True, clean=False, overwrite_a=True)
    return bool(info == 0)
