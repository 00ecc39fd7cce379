"""Forms of one weight besides the dense one, and their bytes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from pysolve.correlations import AnyArray, Indices
from pysolve.errors import DataError

Gaps = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class Sparse:
    """A weight as its non-zero entries and the gaps between them.

    Entries are counted along the rows of the weight as a matrix, one row an output. A gap is the number of
    zeros before an entry; one that is too large for its data type begins with the type's largest number, once
    for each time that fits, without an entry. No row pointers are needed.

    Parameters
    ----------
    shape : tuple of int
        Of the weight.
    values : (nnz,) array
    gaps : (≥ nnz,) uint8 or uint16 array
        The last one belongs to the last entry.

    References
    ----------
    S. Han, H. Mao, W. J. Dally, Deep compression, 2016.
    """

    shape: tuple[int, ...]
    values: AnyArray
    gaps: Gaps

    def __post_init__(self) -> None:
        if self.gaps.dtype not in (np.uint8, np.uint16) or self.gaps.ndim != 1 or self.values.ndim != 1:
            raise DataError("a sparse form needs a row of values and a row of uint8 or uint16 gaps.")
        ends = self.gaps < _top(self.gaps.dtype)
        if int(ends.sum()) != len(self.values) or (len(ends) and not ends[-1]):
            raise DataError(f"expected a gap for each of {len(self.values)} values, got {int(ends.sum())}.")
        places = int(np.prod(self.shape, dtype=np.int64))
        if len(self.values) and self.places()[-1] >= places:
            raise DataError(f"the gaps reach beyond the {places} places of a weight of shape {self.shape}.")

    @classmethod
    def from_dense(cls, weight: AnyArray) -> Sparse:
        """The non-zero entries of a weight."""
        flat = weight.ravel()
        places = np.flatnonzero(flat)
        return cls.at(places, flat[places], weight.shape)

    @classmethod
    def at(cls, places: npt.NDArray[np.int64], values: AnyArray, shape: tuple[int, ...]) -> Sparse:
        """Entries at ascending places, counted along the rows; gaps in the type that needs fewer bytes."""
        forms = [_gaps(places, kind) for kind in (np.uint8, np.uint16)]
        return cls(shape, values, min(forms, key=lambda gaps: gaps.nbytes))

    def dense(self) -> AnyArray:
        """The weight again, exactly."""
        flat = np.zeros(int(np.prod(self.shape, dtype=np.int64)), self.values.dtype)
        flat[self.places()] = self.values
        return flat.reshape(self.shape)

    def csr(self) -> csr_array:
        """The weight as a matrix, one row an output, for ``SparseMatrix.from_csr``."""
        return csr_array(self.dense().reshape(self.shape[0], -1))

    @property
    def nbytes(self) -> int:
        """Bytes of values and gaps."""
        return self.values.nbytes + self.gaps.nbytes

    @property
    def density(self) -> float:
        """Share of the places that have an entry."""
        return len(self.values) / max(1, int(np.prod(self.shape, dtype=np.int64)))

    def places(self) -> npt.NDArray[np.int64]:
        """Flat indices of the entries."""
        reached = np.cumsum(self.gaps, dtype=np.int64)[self.gaps < _top(self.gaps.dtype)]
        return reached + np.arange(len(reached))


@dataclass(frozen=True, eq=False)
class LowRank:
    """A weight as two smaller ones, applied one after the other.

    W[h, c, …] = Σ_k outer[h, k, …] inner[k, c, …], where a kernel's size of 1 is spread along the other's. So
    a matrix is outer · inner; a convolution becomes one with its kernel to r channels and a 1 × 1 behind, or
    one along the height and one along the width. Of a table, an embedding's weight, some rows may be stored
    as they are, apart from the product.

    Parameters
    ----------
    outer : (h − n, r, …) array
        Of the rows that are not stored apart, in their order.
    inner : (r, c, …) array
        Along each dimension of the kernel, one of the two has size 1.
    rows : (n,) int array, optional
        Rows that are stored apart, ascending; none by default.
    exact : (n, c) array, optional
        Their values.

    References
    ----------
    M. Jaderberg, A. Vedaldi, A. Zisserman, Speeding up convolutional neural networks with low rank
    expansions, 2014.
    """

    outer: AnyArray
    inner: AnyArray
    rows: Indices = field(default_factory=lambda: np.zeros(0, np.intp))
    exact: AnyArray | None = None

    def __post_init__(self) -> None:
        shapes = f"{self.outer.shape} and {self.inner.shape}"
        if not self.outer.ndim == self.inner.ndim >= 2 or self.outer.shape[1] != self.inner.shape[0]:
            raise DataError(f"expected factors of shapes (h, r, …) and (r, c, …), got {shapes}.")
        if not self.rank or any(min(pair) != 1 for pair in self._kernels):
            raise DataError(f"along a kernel's dimension one factor must have size 1, got {shapes}.")
        given = (0,) if self.exact is None else self.exact.shape
        if len(self.rows) != given[0] or (self.exact is not None and given[1:] != self.inner.shape[1:]):
            raise DataError(f"expected {len(self.rows)} rows of shape {self.inner.shape[1:]}, got {given}.")
        if len(self.rows) and (self.outer.ndim != 2 or not _ascend(self.rows, self.shape[0])):
            raise DataError(f"rows apart must ascend within 0 … {self.shape[0] - 1} of a matrix.")

    @property
    def rank(self) -> int:
        """Numbers between the two factors."""
        return len(self.inner)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (len(self.outer) + len(self.rows), self.inner.shape[1], *map(max, self._kernels))

    @property
    def _kernels(self) -> list[tuple[int, int]]:
        return [*zip(self.outer.shape[2:], self.inner.shape[2:], strict=True)]

    def dense(self) -> AnyArray:
        """The weight, multiplied out."""
        product = np.asarray(np.einsum("hk...,kc...->hc...", self.outer, self.inner, optimize=True))
        if self.exact is None:
            return product
        return np.concatenate([product, self.exact])[self.places()]

    def places(self) -> npt.NDArray[np.int32]:
        """(h,) place of each row among those of the product, and behind them those that are apart."""
        apart = np.isin(np.arange(self.shape[0]), self.rows)
        found = np.empty(len(apart), np.int32)
        found[np.argsort(apart, kind="stable")] = np.arange(len(apart))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of both factors, and of the rows apart with the places of all."""
        apart = 0 if self.exact is None else self.exact.nbytes + self.places().nbytes
        return self.outer.nbytes + self.inner.nbytes + apart

    @property
    def density(self) -> float:
        """Numbers of the factors, and of the rows apart, as a share of the weight's."""
        apart = 0 if self.exact is None else self.exact.size
        return (self.outer.size + self.inner.size + apart) / max(1, int(np.prod(self.shape, dtype=np.int64)))


@dataclass(frozen=True, eq=False)
class _Coded:
    """A weight as small integers that stand for its entries."""

    codes: AnyArray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.shape

    def with_codes(self, codes: AnyArray) -> Self:
        """The same with other codes, or with these in another shape."""
        return replace(self, codes=codes)


@dataclass(frozen=True, eq=False)
class Codebook(_Coded):
    """A weight as codes of the values that its entries share: W = centroids[codes].

    Parameters
    ----------
    codes : uint8 array
        Of the weight's shape.
    centroids : (k,) array
        The values of codes 0, 1, …; at most 256.
    """

    codes: npt.NDArray[np.uint8]
    centroids: AnyArray

    def __post_init__(self) -> None:
        if self.codes.dtype != np.uint8:
            raise DataError(f"expected codes of uint8, got {self.codes.dtype}.")
        if self.centroids.ndim != 1 or not 1 <= len(self.centroids) <= 256:
            raise DataError(f"expected a row of 1 … 256 centroids, got shape {self.centroids.shape}.")
        most = int(self.codes.max(initial=0))
        if most >= len(self.centroids):
            raise DataError(f"there is a code {most}, but only {len(self.centroids)} centroids.")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return max(1, (len(self.centroids) - 1).bit_length())

    def dense(self) -> AnyArray:
        """The weight again."""
        return np.asarray(self.centroids[self.codes])

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and of the centroids."""
        return _packed_bytes(self.codes.size, self.bits) + self.centroids.nbytes


@dataclass(frozen=True, eq=False)
class Integers(_Coded):
    """A weight as small integers: (codes − zeros) · scales.

    Parameters
    ----------
    codes : int8 array
        Of the weight's shape (h, …), within −2^(bits − 1) … 2^(bits − 1) − 1.
    scales : (h, groups) array
        Of every output and group of inputs, in the order of ``weight.flatten(1)``.
    zeros : (h, groups) int8 array, optional
        Codes of zero; 0 everywhere if not given.
    bits : int
        2 … 8.
    group : int, optional
        Consecutive inputs of a group, the last one may have fewer; all of a row by default.
    dynamic : bool
        Whether the inputs are rounded too, each row anew; only without zeros and groups.
    """

    codes: npt.NDArray[np.int8]
    scales: AnyArray
    zeros: npt.NDArray[np.int8] | None = None
    bits: int = 8
    group: int | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        zeros = self.codes[:0] if self.zeros is None else self.zeros
        if self.codes.dtype != np.int8 or zeros.dtype != np.int8 or self.codes.ndim < 2:
            raise DataError(f"expected codes (h, …) of int8, got {self.codes.dtype} of {self.codes.shape}.")
        if not 2 <= self.bits <= 8 or (self.group is not None and self.group < 1):
            raise DataError(f"expected 2 … 8 bits and a group of inputs, got {self.bits} and {self.group}.")
        wanted = (len(self.codes), -(-self._columns // self._group))
        if self.scales.shape != wanted or (self.zeros is not None and zeros.shape != wanted):
            raise DataError(f"expected scales and zeros of shape {wanted}, got {self.scales.shape}.")
        if self.dynamic and (self.zeros is not None or wanted[1] > 1):
            raise DataError("inputs are rounded only with one scale for each output and no zeros.")
        top = 1 << (self.bits - 1)
        for codes in (self.codes, zeros):
            if codes.min(initial=0) < -top or codes.max(initial=0) >= top:
                raise DataError(f"there are codes beyond −{top} … {top - 1}, the range of {self.bits} bits.")

    @property
    def _columns(self) -> int:
        return int(np.prod(self.codes.shape[1:], dtype=np.int64))

    @property
    def _group(self) -> int:
        return self.group or max(1, self._columns)

    def dense(self) -> AnyArray:
        """The weight again, exactly: in double precision."""
        part = np.arange(self._columns) // self._group
        steps = self.codes.reshape(len(self.codes), self._columns).astype(np.float64)
        if self.zeros is not None:
            steps -= self.zeros[:, part]
        return np.asarray((steps * self.scales[:, part]).reshape(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes, of scales and zeros."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return _packed_bytes(self.codes.size, self.bits) + self.scales.nbytes + zeros


QuantForm = Codebook | Integers
# Forms that a layer runs in; a codebook's values are decoded once.
RuntimeForm = Sparse | LowRank | Integers
Form = Sparse | LowRank | Codebook | Integers


def pack(codes: AnyArray, bits: int) -> npt.NDArray[np.uint8]:
    """The lowest bits of integers, one number after the other."""
    rows = np.unpackbits(codes.astype(np.uint8).ravel()[:, None], axis=1)
    return np.packbits(rows[:, 8 - bits :])


def unpack(data: npt.NDArray[np.uint8], bits: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The numbers that ``pack`` took, without sign. Raises DataError if the data is not of that many."""
    size = int(np.prod(shape, dtype=np.int64))
    if len(data) != _packed_bytes(size, bits):
        raise DataError(f"{len(data)} bytes do not hold {size} codes of {bits} bits.")
    rows = np.unpackbits(data, count=size * bits).reshape(size, bits)
    return np.packbits(np.pad(rows, ((0, 0), (8 - bits, 0))), axis=1).reshape(shape)


def _ascend(rows: Indices, limit: int) -> bool:
    return bool(rows[0] >= 0 and rows[-1] < limit and (np.diff(rows) > 0).all())


def _packed_bytes(size: int, bits: int) -> int:
    return -(-size * bits // 8)


def _top(kind: npt.DTypeLike) -> int:
    """The gap that stands for so many zeros without an entry."""
    return int(np.iinfo(np.dtype(kind)).max)


def _gaps(places: npt.NDArray[np.int64], kind: npt.DTypeLike) -> Gaps:
    gaps, top = np.diff(places, prepend=-1) - 1, _top(kind)
    whole = gaps // top
    ends = np.cumsum(whole + 1) - 1
    coded = np.full(int(ends[-1]) + 1 if len(ends) else 0, top, kind)
    coded[ends] = gaps % top
    return coded
