"""The problem that all matrix functions solve, and the one place where what users give is checked."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Concatenate, ParamSpec, Protocol, TypeGuard, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

from pysolve import _core
from pysolve.correlations import Array, Correlations, Mask, as_numpy
from pysolve.errors import whole
from pysolve.solve.lapack import eigh

P = ParamSpec("P")
T_co = TypeVar("T_co", covariant=True)

Spectrum = tuple[Array, Array, Array]

# Negative eigenvalues up to these shares of the trace (of R at unit diagonal) pass as rounding: the first in
# float64, the last in sums gathered in float32.
ROUNDING_SHARES = tuple((10.0 ** (np.arange(-28, -11) / 2)).tolist())

# Variances below have lost digits: their squares underflow.
TINY = float(np.finfo(np.float64).tiny)

# Products of three numbers up to this are finite, and so are sums of them.
LARGEST = 1e90


@dataclass(frozen=True, eq=False)
class Problem:
    """min_M  Σ_r ( ½⟨M_r R_r, M_r⟩ − ⟨C_r, M_r⟩ ) + lam Σ_g w_g ‖M_g‖_F, one or several readers r.

    The readers read the same d inputs and share their groups, consecutive blocks of ``group_size`` inputs:
    ‖M_g‖ runs over the columns of group g in every M_r. ``xx`` has R_r = E[x xᵀ] (d, d) of each reader,
    symmetric positive semi-definite, ``yx`` C_r = E[y xᵀ] (h_r, d), ``weights`` w_g ≥ 0: a group of weight 0
    is not penalised. ``problem_of`` makes and checks it. Where rounding had left R_r indefinite, its diagonal
    was multiplied by 1 + ``raised[r]``.
    """

    xx: tuple[Array, ...]
    yx: tuple[Array, ...]
    group_size: int
    weights: Array
    raised: tuple[float, ...] = ()

    @property
    def inputs(self) -> int:
        return len(self.xx[0])

    @property
    def groups(self) -> int:
        return self.inputs // self.group_size

    @property
    def penalised(self) -> Mask:
        """Mask over the groups."""
        return self.weights > 0

    @cached_property
    def lifts(self) -> tuple[Array, ...]:
        """What was added to the diagonal of each R_r as given, (d,)."""
        shares = self.raised or (0.0,) * len(self.xx)
        return tuple(np.diag(R) * (share / (1 + share)) for R, share in zip(self.xx, shares, strict=True))

    @cached_property
    def spectra(self) -> tuple[Spectrum, ...]:
        """``spectrum_of`` each R_r; takes longer than most solves, and a path asks for it at every lam."""
        return tuple(map(spectrum_of, self.xx))


def spectrum_of(R: Array) -> Spectrum:
    """Scale of each input, and the eigenvalues, rising, and eigenvectors of R at unit diagonal."""
    unit = np.sqrt(np.where(np.diag(R) > 0, np.diag(R), 1.0))
    return unit, *eigh(R / unit / unit[:, None])


Pair = tuple[npt.ArrayLike, npt.ArrayLike]
Problems = Problem | Correlations | Pair | Sequence[Correlations] | Sequence[Pair]
# One (h, d) matrix, or for several readers a tuple of one each.
Matrices = Array | tuple[Array, ...]


class Verb(Protocol[P, T_co]):
    """A function whose problem comes as one argument or as the two matrices r_xx and r_yx."""

    @overload
    def __call__(self, problem: Problems, /, *args: P.args, **kwargs: P.kwargs) -> T_co: ...
    @overload
    def __call__(
        self, r_xx: npt.ArrayLike, r_yx: npt.ArrayLike, /, *args: P.args, **kwargs: P.kwargs
    ) -> T_co: ...


def takes_problem(function: Callable[Concatenate[Problems, P], T_co]) -> Verb[P, T_co]:
    """Let the first argument of a function, a problem as for ``problem_of``, also come as r_xx, r_yx."""

    called: Callable[..., T_co] = function

    @wraps(function)
    def verb(r_xx: object = None, r_yx: object = None, *args: object, **kwargs: object) -> T_co:
        if r_xx is None and r_yx is None:
            # By its name, or missing: Python says so.
            return called(*args, **kwargs)
        if r_yx is None:
            return called(r_xx, *args, **kwargs)
        if _stands_alone(r_xx) or np.isscalar(r_yx):
            return called(r_xx, r_yx, *args, **kwargs)
        return called((r_xx, r_yx), *args, **kwargs)

    return cast("Verb[P, T_co]", verb)


def problem_of(
    problem: Problems, group_size: int | None = None, weights: npt.ArrayLike | None = None
) -> Problem:
    """A checked Problem from a Correlations, a pair (r_xx, r_yx), a list of these, or a Problem.

    A list, or a pair of lists of matrices, holds one problem a reader. A Problem is returned as it is.
    """
    if isinstance(problem, Problem):
        return problem
    readers = _readers(problem)
    if not readers:
        raise ValueError("expected at least one problem, got an empty list.")
    pairs = [(p.r_xx, p.r_yx) if isinstance(p, Correlations) else _pair(p) for p in readers]
    xx, yx, raised = zip(*(checked_reader(*pair) for pair in pairs), strict=True)
    d = len(xx[0])
    if d == 0:
        raise ValueError("r_xx must not be empty; a problem needs at least one input.")
    if any(len(c) == 0 for c in yx):
        raise ValueError("r_yx has no rows; a problem needs at least one output.")
    for r in xx[1:]:
        if len(r) != d:
            raise ValueError(f"readers must share their inputs, got {d} and {len(r)} inputs.")
    sizes = {p.group_size for p in readers if isinstance(p, Correlations)}
    if group_size is None:
        if len(sizes) > 1:
            raise ValueError(f"readers must share their groups, got group sizes {sorted(sizes)}.")
        group_size = sizes.pop() if sizes else 1
    group_size = checked_group_size(group_size, d)
    return Problem(xx, yx, group_size, checked_weights(weights, d // group_size), raised)


def one_or_all(M: Sequence[Array]) -> Matrices:
    """The matrix of a single reader, or a tuple of one a reader."""
    return tuple(M) if len(M) > 1 else M[0]


def answers_of(
    name: str, M: npt.ArrayLike | Matrices, problem: Problem, *, largest: float = LARGEST
) -> list[Array]:
    """One checked matrix a reader, in the shapes of the problem's outputs."""
    answers = [checked_matrix(name, m, largest=largest) for m in _listed(M)]
    got, wanted = [m.shape for m in answers], [c.shape for c in problem.yx]
    if got != wanted:
        raise ValueError(f"{name} has shape {got}, but the problem needs {wanted}.")
    return answers


def _listed(M: npt.ArrayLike) -> Sequence[npt.ArrayLike]:
    """One matrix a reader, of a matrix or of a list or tuple of them."""
    return M if _is_listed(M) else [M]


def check_lam(lam: float) -> float:
    """``lam`` as a float; ValueError unless it is positive and finite."""
    try:
        value = float(lam)
    except (TypeError, ValueError):
        raise TypeError(f"lam must be a number, got {lam!r}.") from None
    if not 0 < value <= LARGEST:
        raise ValueError(
            f"lam must be positive and finite, at most {LARGEST:g}, got {lam}. "
            "For no penalty at all, use debias."
        )
    return value


def checked_matrix(name: str, value: npt.ArrayLike, *, largest: float = LARGEST) -> Array:
    """``value`` (array, nested list or CPU tensor) as a finite float64 matrix, row after row in memory."""
    matrix = as_numpy(name, value)
    if matrix.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {matrix.dtype}.")
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got an array of shape {matrix.shape}.")
    matrix = np.ascontiguousarray(matrix, dtype=np.float64)
    bad = matrix.size - np.count_nonzero(np.isfinite(matrix))
    if bad:
        raise ValueError(
            f"{name} has {bad} entries that are not finite; look for NaN or infinity in the data."
        )
    peak = _peak(matrix)
    if peak > largest:
        raise ValueError(f"{name} has entries up to {peak:.3g}, whose products overflow: scale it down.")
    return matrix


def checked_correlations(name: str, value: npt.ArrayLike) -> Array:
    """``value`` as a symmetric positive semi-definite matrix, up to what rounding in float32 takes."""
    return _raised(name, value)[0]


def _raised(name: str, value: npt.ArrayLike) -> tuple[Array, float]:
    """``checked_correlations``, and the share by which each diagonal entry was raised."""
    xx = checked_matrix(name, value)
    if xx.shape[0] != xx.shape[1]:
        raise ValueError(f"{name} must be square, got {xx.shape[0]} x {xx.shape[1]}.")
    if 0 < (peak := _peak(xx)) < 1 / LARGEST:
        raise ValueError(f"{name} has no entry above {peak:.3g}, so that products vanish: scale it up.")
    asymmetry = _asymmetry(xx)
    if asymmetry > 1e-6:
        raise ValueError(
            f"{name} is not symmetric: mirrored entries differ by up to {asymmetry:.3g} of the largest."
        )
    if asymmetry:
        xx = (xx + xx.T) / 2
    return _semidefinite(name, _without_vanished(name, xx))


def checked_group_size(group_size: int, columns: int) -> int:
    """``group_size`` as an int that divides the columns."""
    size = whole("group_size", group_size)
    if columns % size:
        raise ValueError(f"group_size must divide the {columns} inputs, got {size}.")
    return size


def checked_weights(weights: npt.ArrayLike | None, groups: int) -> Array:
    """One finite weight ≥ 0 a group; all 1 when not given."""
    if weights is None:
        return np.ones(groups)
    array = as_numpy("weights", weights).astype(np.float64)
    if array.shape != (groups,):
        raise ValueError(
            f"weights must hold one number for each of the {groups} groups, got shape {array.shape}."
        )
    if not np.all((array == 0) | ((array >= 1 / LARGEST) & (array <= LARGEST))):
        raise ValueError(
            f"weights must be finite and at least 0 (0: that group is not penalised), from {1 / LARGEST:g} "
            f"to {LARGEST:g} otherwise."
        )
    return array


def half_trace(r_yy: npt.ArrayLike | Sequence[npt.ArrayLike] | None, outputs: Sequence[int]) -> float:
    """½ E‖y‖² from E[y yᵀ], its diagonal or its trace; or from a list of one for each of several readers.

    ``outputs`` has how many each reader makes.
    """
    if r_yy is None:
        return 0.0
    if len(outputs) > 1 and isinstance(r_yy, list | tuple):
        if len(r_yy) != len(outputs):
            raise ValueError(f"r_yy must have one entry for each of {len(outputs)} readers, got {len(r_yy)}.")
        return sum(half_trace(part, [h]) for part, h in zip(r_yy, outputs, strict=True))
    value, h = as_numpy("r_yy", r_yy), sum(outputs)
    if value.dtype.kind not in "fiub":
        raise TypeError(f"r_yy must hold real numbers, got dtype {value.dtype}.")
    value = value.astype(np.float64)
    if value.shape not in ((), (h,), (h, h)):
        raise ValueError(
            f"r_yy must be E[y yᵀ] of {h} outputs, its diagonal or its trace, got shape {value.shape}."
        )
    energy = float(np.trace(value) if value.ndim == 2 else value.sum())
    if not 0 <= energy <= LARGEST**2:
        raise ValueError(f"r_yy must have a finite trace of at least 0, got {energy}.")
    return 0.5 * energy


def _stands_alone(problem: object) -> bool:
    """Whether it is a problem without a second matrix."""
    if isinstance(problem, list):
        return not problem or isinstance(problem[0], Correlations | tuple)
    return isinstance(problem, Problem | Correlations | tuple)


def _is_listed(M: object) -> TypeGuard[Sequence[npt.ArrayLike]]:
    return isinstance(M, list | tuple) and len(M) > 0 and np.ndim(M[0]) == 2


def _readers(problem: object) -> list[object]:
    """One problem a reader."""
    if isinstance(problem, list):
        return problem
    if isinstance(problem, tuple):
        if all(isinstance(p, Correlations | tuple) for p in problem):
            return list(problem)
        if len(problem) == 2 and _is_listed(problem[0]):
            yx = _listed(problem[1])
            if len(yx) != len(problem[0]):
                raise ValueError(f"expected one r_yx for each of {len(problem[0])} r_xx, got {len(yx)}.")
            return list(zip(problem[0], yx, strict=True))
    return [problem]


def _pair(value: object) -> Pair:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(
            f"a problem is a Correlations or a tuple (r_xx, r_yx), several are a list of those; "
            f"got {type(value).__name__}."
        )
    return value[0], value[1]


def checked_reader(r_xx: npt.ArrayLike, r_yx: npt.ArrayLike) -> tuple[Array, Array, float]:
    """E[x xᵀ] and E[y xᵀ] of one reader, as far as data can have them, and its ``Problem.raised``."""
    (xx, share), yx = _raised("r_xx", r_xx), checked_matrix("r_yx", r_yx)
    d = len(xx)
    if yx.shape[1] != d:
        raise ValueError(
            f"r_yx has {yx.shape[1]} columns but r_xx is {d} x {d}; both must describe the same inputs. "
            "Were they gathered from the same layer?"
        )
    # C² ≤ R E[y²]: beyond this, E[y²] could be no number. R may be zero by underflow alone.
    variance = np.diag(xx)
    impossible = np.count_nonzero(np.any(np.abs(yx) > LARGEST * np.sqrt(np.maximum(variance, TINY)), axis=0))
    if impossible:
        raise ValueError(
            f"r_yx is not zero for {impossible} inputs whose r_xx is zero; an input that is always 0 "
            "correlates with nothing. Were they gathered from the same data?"
        )
    vanished = (variance == 0) & yx.any(0)
    return xx, np.where(vanished, 0.0, yx) if vanished.any() else yx, share


def _asymmetry(xx: Array) -> float:
    """Largest difference of an entry from its mirror, as a share of the largest entry."""
    # In strips, so that no temporary is large: fresh memory costs more than the arithmetic.
    difference = 0.0
    for i in range(0, len(xx), 128):
        strip = xx[i : i + 128, i:] - xx[i:, i : i + 128].T
        difference = max(difference, float(np.abs(strip, out=strip).max()))
    return difference / _peak(xx) if difference else 0.0


def _peak(matrix: Array) -> float:
    """Largest absolute value of any entry, without a copy."""
    return max(float(matrix.max(initial=0.0)), -float(matrix.min(initial=0.0)))


def _without_vanished(name: str, xx: Array) -> Array:
    """xx with zeros for inputs whose variance underflows, or is zero but for rounding in the largest one."""
    diagonal = np.diag(xx)
    if diagonal.min(initial=0.0) < -1e-9 * diagonal.max(initial=0.0):
        raise ValueError(f"{name} has a negative diagonal entry, {diagonal.min():.3g}; E[x xᵀ] cannot.")
    vanished = diagonal < TINY
    if vanished.any() and xx[vanished].any():
        xx = xx.copy()
        xx[vanished] = xx[:, vanished] = 0.0
    return xx


def _semidefinite(name: str, xx: Array) -> tuple[Array, float]:
    """xx, its diagonal raised by a share as small as what rounding in float32 takes; ValueError beyond."""
    diagonal, d = np.diag(xx), len(xx)
    unit = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))

    def suffices(share: float) -> bool:
        scaled = xx / unit[:, None]
        scaled /= unit
        return factors(scaled, share * d)

    # At the first, smallest share the factorisation may only have met its own rounding.
    if suffices(ROUNDING_SHARES[0]):
        return xx, 0.0
    if not suffices(ROUNDING_SHARES[-1]):
        raise ValueError(
            f"{name} is not positive semi-definite, so it is no correlation matrix E[x xᵀ]. Was a centred or "
            "approximate matrix computed with too few digits? Sum it up, and centre it, in float64."
        )
    least = bisect_left(ROUNDING_SHARES, True, lo=1, hi=len(ROUNDING_SHARES) - 1, key=suffices)
    share = ROUNDING_SHARES[least] * d
    return xx + np.diag(share * diagonal), share


def factors(matrix: Array, shift: float) -> bool:
    """Whether matrix + shift is positive definite; overwrites the matrix."""
    matrix.flat[:: len(matrix) + 1] += shift
    return _core.cholesky(matrix)
