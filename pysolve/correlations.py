"""Correlations of one layer's inputs and outputs, as sums over samples: all that the solvers need."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from pysolve.errors import DataError, path_of, whole
from pysolve.whole_files import replacing

Array = npt.NDArray[np.float64]
# An array of any data type.
AnyArray = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

# A variance below this share of the mean square is rounding: of sums of many samples, and of what networks
# compute in float32 where it should be constant.
_CONSTANT = 1e-10

# Multiplications of one product or call of LAPACK, some 200 ms: an interrupt must not wait for longer ones.
LONGEST = 4e9

# Mean squares of inputs below this, as only networks that compute nothing have: products of them underflow.
_NOTHING = 1e-80


def as_numpy(name: str, values: Any) -> AnyArray:
    """Numbers of an array, a nested list or a CPU tensor of any dtype, one that needs a gradient included."""
    if hasattr(values, "detach"):
        if values.device.type != "cpu":
            raise TypeError(f"{name} is on {values.device}; pass {name}.cpu().")
        values = values.detach()
        # NumPy knows no such types.
        if str(values.dtype).startswith(("torch.bfloat", "torch.float8")):
            values = values.double()
    if np.ma.is_masked(values):
        raise ValueError(f"{name} has masked entries: fill them, or leave out the samples that they are of.")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} cannot be read as an array of numbers: {error}") from error
    # Half types of other packages are none of NumPy's.
    foreign = array.dtype.isbuiltin == 2 and array.dtype.name.startswith(("bfloat", "float8"))
    return array.astype(np.float64) if foreign else array


def pieces(count: int, each: float) -> list[slice]:
    """Slices of rows that take ``each`` multiplications: of at most LONGEST, or of 64 rows."""
    together = max(int(LONGEST / max(each, 1)), 64)
    return [slice(first, first + together) for first in range(0, count, together)]


def product(A: Array, B: Array) -> Array:
    """A @ B; a long one some rows at a time, between which an interrupt is heard."""
    if len(parts := pieces(len(A), B.size)) <= 1:
        return np.asarray(A @ B)
    found = np.empty((len(A), B.shape[1]))
    for rows in parts:
        np.matmul(A[rows], B, out=found[rows])
    return found


def gram(A: Array) -> Array:
    """Aᵀ A, exactly symmetric, as ``product``: half of the work."""
    if len(parts := pieces(A.shape[1], A.size)) <= 1:
        return np.asarray(A.T @ A)
    found = np.empty((A.shape[1],) * 2)
    for own in parts:
        rest = slice(own.stop, None)
        found[own, own] = A[:, own].T @ A[:, own]
        found[own, rest] = A[:, own].T @ A[:, rest]
        found[rest, own] = found[own, rest].T
    return found


def group_indices(keep: npt.ArrayLike) -> Indices:
    """``keep`` as indices; TypeError for a mask and for numbers that are no integers."""
    indices = np.asarray(keep)
    if indices.dtype == np.bool_:
        raise TypeError("keep must list indices, got a mask; use np.flatnonzero(mask).")
    if indices.ndim != 1:
        raise ValueError(f"keep must be a list of group indices, got shape {indices.shape}.")
    if indices.size and indices.dtype.kind not in "iu":
        raise TypeError(f"keep must hold integers, got dtype {indices.dtype}; convert with .astype(int).")
    return indices.astype(np.intp)


def all_but(count: int, gone: npt.ArrayLike) -> Indices:
    """0 … count − 1 without some, ascending."""
    left = np.ones(count, bool)
    left[np.asarray(gone, dtype=np.intp)] = False
    return np.flatnonzero(left)


def group_columns(keep: npt.ArrayLike, group_size: int) -> Indices:
    """Column indices of the groups in ``keep``: group g owns columns g·group_size … (g+1)·group_size − 1."""
    groups = group_indices(keep)
    return np.asarray((groups[:, None] * group_size + np.arange(group_size)).ravel())


def _within(what: str, indices: npt.ArrayLike, count: int, kind: str) -> Indices:
    """Indices of ``count`` things; ValueError where one is of none of them."""
    found = group_indices(indices)
    if len(found) and not 0 <= found.min() <= found.max() < count:
        raise ValueError(
            f"{what} must lie within 0 … {count - 1}, for {count} {kind}, got {found.min()} … {found.max()}."
        )
    return found


def group_norms(M: Sequence[Array], group_size: int) -> Array:
    """‖M_g‖_F of every group over all readers' (h_r, d) matrices; no overflow or underflow of the squares."""
    peak = max((float(np.abs(m).max()) for m in M if m.size), default=0.0)
    if peak == 0.0:
        return np.zeros(M[0].shape[1] // group_size)
    squares = sum(np.square(m / peak).sum(0) for m in M)
    return np.asarray(peak * np.sqrt(np.reshape(squares, (-1, group_size)).sum(1)))


@dataclass(frozen=True, eq=False)
class Correlations:
    """Sums over ``count`` samples of a layer's inputs x (d values) and wanted outputs y (h values).

    Sums, not means, so that two passes over different data merge with ``+``. The solvers work on the
    means ``r_xx``, ``r_yx``, ``r_yy``.

    Parameters
    ----------
    xx : (d, d) array
        Σ x xᵀ.
    yx : (h, d) array
        Σ y xᵀ.
    yy : (h, h) array, or (h,) array
        Σ y yᵀ, or its diagonal, which is all that most solvers read of it.
    count : int
        Number of samples.
    x_sum, y_sum : (d,) and (h,) arrays
        Σ x and Σ y, for centring, and hence an unpenalised bias.
    group_size : int
        Consecutive inputs that belong to one channel: 1 for a Linear after a Linear, taps for a
        convolution, height × width for a Linear after a flatten.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> known = ps.Correlations(x.T @ x, y.T @ x, y.T @ y, 1000, x.sum(0), y.sum(0))
    >>> ps.select_channels(known.centered(), k=5)
    array([0, 1, 2, 3, 4])
    """

    xx: Array
    yx: Array
    yy: Array
    count: int
    x_sum: Array
    y_sum: Array
    group_size: int = 1

    def __post_init__(self) -> None:
        for name in ("xx", "yx", "yy", "x_sum", "y_sum"):
            values = as_numpy(name, getattr(self, name))
            object.__setattr__(self, name, np.ascontiguousarray(values, dtype=np.float64))
        if self.yx.ndim != 2:
            raise ValueError(f"yx must be a matrix (outputs x inputs), got shape {self.yx.shape}.")
        h, d = self.yx.shape
        wanted = {"xx": (d, d), "yy": (h,) if self.yy.ndim == 1 else (h, h), "x_sum": (d,), "y_sum": (h,)}
        for name, shape in wanted.items():
            if (got := getattr(self, name).shape) != shape:
                raise ValueError(
                    f"{name} has shape {got}, but yx is {h} x {d}, so {name} must be {shape}. "
                    "Were they gathered from the same layer?"
                )
        object.__setattr__(self, "count", whole("count", self.count))
        object.__setattr__(self, "group_size", whole("group_size", self.group_size))
        if d % self.group_size:
            raise ValueError(f"group_size must divide the {d} inputs, got {self.group_size}.")

    @classmethod
    def from_samples(cls, x: npt.ArrayLike, y: npt.ArrayLike, *, group_size: int = 1) -> Correlations:
        """Correlations of samples in rows: ``x`` (n, d) and ``y`` (n, h)."""
        x, y = as_numpy("x", x).astype(np.float64), as_numpy("y", y).astype(np.float64)
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(f"x and y must be matrices with one row a sample, got {x.shape} and {y.shape}.")
        sums = gram(x), product(y.T, x), gram(y)
        return cls(*sums, len(x), x.sum(0), y.sum(0), group_size)

    @property
    def r_xx(self) -> Array:
        """E[x xᵀ], (d, d)."""
        return self.xx / self.count

    @property
    def r_yx(self) -> Array:
        """E[y xᵀ], (h, d)."""
        return self.yx / self.count

    @property
    def r_yy(self) -> Array:
        """E[y yᵀ], (h, h), or its diagonal, (h,)."""
        return self.yy / self.count

    @property
    def energy(self) -> float:
        """E‖y‖²."""
        return float(self.yy.sum() if self.yy.ndim == 1 else np.trace(self.yy)) / self.count

    @property
    def vanishes(self) -> bool:
        """Whether the inputs are so small, though not zero, that nothing can be fitted to them."""
        return 0 < float(np.diag(self.xx).max(initial=0.0)) < _NOTHING * self.count

    @property
    def groups(self) -> int:
        """Number of input channels."""
        return len(self.xx) // self.group_size

    def __add__(self, other: Correlations) -> Correlations:
        if not isinstance(other, Correlations):
            return NotImplemented
        if self.yx.shape != other.yx.shape or self.group_size != other.group_size:
            raise ValueError(
                f"cannot add correlations of {self.yx.shape} with groups of {self.group_size} to "
                f"{other.yx.shape} with groups of {other.group_size}: they describe different layers."
            )
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        if self.yy.ndim != other.yy.ndim:
            sums["yy"] = _diagonal(self.yy) + _diagonal(other.yy)
        return Correlations(**{**sums, "group_size": self.group_size})

    @staticmethod
    def merge(parts: Iterable[Correlations]) -> Correlations:
        """Sum of several correlations of one layer, for example from several machines."""
        parts = list(parts)
        if not parts:
            raise ValueError("merge needs at least one Correlations, got none.")
        return reduce(Correlations.__add__, parts)

    def centered(self) -> Correlations:
        """Correlations of x − E[x] and y − E[y].

        Solving on these gives the M of a layer whose bias is free and unpenalised; ``bias(M)`` of the
        uncentred correlations is that bias. Inputs and outputs whose variance is at most 1e-10 of their mean
        square count as constants, and have none.
        """
        return _centre(replace(self, xx=self.xx.copy(), yx=self.yx.copy(), yy=self.yy.copy()))

    def covariance(self, columns: Indices | None = None) -> tuple[Array, Array]:
        """``r_xx`` and ``r_yx`` of ``centered``, of all inputs or of some, in less memory."""
        every = np.arange(len(self.xx)) if columns is None else columns
        own = _centre(replace(self, group_size=1, yy=self.yy.copy()).restrict(every))
        return np.divide(own.xx, self.count, out=own.xx), np.divide(own.yx, self.count, out=own.yx)

    def bias(self, M: npt.ArrayLike) -> Array:
        """The bias that minimises E‖y − M x − b‖² for a given (h, d) ``M``: b = E[y] − M E[x]."""
        return np.asarray(self.y_sum - np.asarray(M) @ self.x_sum) / self.count

    def restrict(self, keep: npt.ArrayLike) -> Correlations:
        """Correlations of the input groups in ``keep`` only, in that order."""
        groups = _within("keep", keep, self.groups, "groups of inputs")
        if np.array_equal(groups, np.arange(self.groups)):
            # Much faster than by index.
            return replace(self, xx=self.xx.copy(), yx=self.yx.copy(), x_sum=self.x_sum.copy())
        columns = group_columns(groups, self.group_size)
        return replace(
            self, xx=self.xx[np.ix_(columns, columns)], yx=self.yx[:, columns], x_sum=self.x_sum[columns]
        )

    def of_outputs(self, rows: npt.ArrayLike) -> Correlations:
        """Correlations of the outputs in ``rows`` only, in that order."""
        rows = _within("rows", rows, len(self.yx), "outputs")
        yy = self.yy[rows] if self.yy.ndim == 1 else self.yy[np.ix_(rows, rows)]
        return replace(self, yx=self.yx[rows], yy=yy, y_sum=self.y_sum[rows])

    def error(self, M: npt.ArrayLike, bias: npt.ArrayLike | None = None) -> float:
        """½ E‖y − M x − b‖² for an (h, d) ``M`` and an (h,) ``bias`` (zero when not given)."""
        M = np.asarray(M, dtype=np.float64)
        b = np.zeros(len(self.yx)) if bias is None else np.asarray(bias, dtype=np.float64)
        total = self.count * self.energy + np.vdot(product(M, self.xx) - 2 * self.yx, M)
        total += self.count * (b @ b) + 2 * b @ (M @ self.x_sum - self.y_sum)
        return float(0.5 * total / self.count)

    def share_lost(self, M: npt.ArrayLike, bias: npt.ArrayLike | None = None) -> float:
        """E‖y − M x − b‖² / E‖y − E[y]‖²: 0 for a perfect fit, 1 for the mean alone."""
        energy = self.energy - np.square(self.y_sum / self.count).sum()
        return float(max(2 * self.error(M, bias), 0.0) / energy) if energy > 0 else 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.npz`` file; an existing file is replaced only once the new one is complete."""
        path = path_of("path", path)
        values: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        with replacing(path, sum(one.nbytes for one in values.values())) as part, part.open("wb") as file:
            np.savez(file, **values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Correlations:
        """Read a file that ``save`` wrote; DataError when it is not one."""
        path, names = path_of("path", path), [f.name for f in fields(cls)]
        try:
            with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                values: dict[str, Any] = {
                    name: _member(archive, f"{name}.npy", os.stat(path).st_size) for name in names
                }
            counts = {name: whole(name, values[name].item()) for name in ("count", "group_size")}
            found = cls(**{**values, **counts})
            check_finite(found)
        except FileNotFoundError:
            raise
        # Whatever a file may hold: zipfile and NumPy do not name their errors.
        except Exception as error:
            why = str(error).rstrip(".")
            raise DataError(
                f"{path!s} is not a file written by Correlations.save, or it is damaged: {why}. Copy it "
                "anew, or gather again."
            ) from error
        return found

    def __repr__(self) -> str:
        h, d = self.yx.shape
        return f"Correlations({d} inputs in groups of {self.group_size}, {h} outputs, {self.count} samples)"


def check_finite(found: Correlations) -> None:
    """Raise DataError for sums that no samples have."""
    for one in fields(found):
        if not np.isfinite(getattr(found, one.name)).all():
            raise DataError(f"its {one.name} holds NaN or infinity.")


def _member(archive: zipfile.ZipFile, name: str, most: int) -> AnyArray:
    """An array of an archive, with its checksum; no more than ``most`` bytes are read."""
    size = archive.getinfo(name).file_size
    if size > most:
        raise DataError(f"{name} takes {size:,} bytes, the file {most:,}.")
    with archive.open(name) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise DataError(f"{name} is no array that NumPy wrote with such a name.")
        shape, fortran, kind = np.lib.format.read_array_header_1_0(file)
        content = file.read()
    if kind.kind not in "fiub" or math.prod(shape) * kind.itemsize != len(content):
        raise DataError(f"{name} should hold {kind} of shape {shape}, but has {len(content)} bytes.")
    return np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")


def without_sums(found: Correlations) -> Correlations:
    """Correlations that centring does not change: of a layer without a bias to make up for means."""
    return replace(found, x_sum=np.zeros_like(found.x_sum), y_sum=np.zeros_like(found.y_sum))


def _centre(own: Correlations, strip: int = 256) -> Correlations:
    """Centred correlations in the place of the given ones."""
    x_mean, y_mean = own.x_sum / own.count, own.y_sum / own.count
    x_before, y_before = np.diag(own.xx).copy(), _diagonal(own.yy).copy()
    for sums, totals in ((own.xx, own.x_sum), (own.yx, own.y_sum)):
        # By strips: without a second matrix of their size.
        for start in range(0, len(sums), strip):
            rows = slice(start, start + strip)
            sums[rows] -= np.outer(totals[rows], x_mean)
    yy = own.yy
    yy -= own.y_sum * y_mean if yy.ndim == 1 else np.outer(own.y_sum, y_mean)
    # The variance of a constant is rounding alone, of either sign.
    constant_x = np.diag(own.xx) <= _CONSTANT * x_before
    constant_y = _diagonal(yy) <= _CONSTANT * y_before
    own.xx[constant_x] = 0.0
    own.xx[:, constant_x] = own.yx[:, constant_x] = 0.0
    yy[constant_y] = yy[..., constant_y] = own.yx[constant_y] = 0.0
    return replace(own, x_sum=np.zeros_like(own.x_sum), y_sum=np.zeros_like(own.y_sum))


def _diagonal(yy: Array) -> Array:
    return yy if yy.ndim == 1 else np.diag(yy)
