"""Other ways to store one weight, and what they cost in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from pysolve.errors import DataError
from pysolve.quantization.forms import Int8

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
    """

    shape: tuple[int, ...]
    values: npt.NDArray[Any]
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
    def from_dense(cls, weight: npt.NDArray[Any]) -> Sparse:
        """The non-zero entries of a weight."""
        flat = weight.ravel()
        places = np.flatnonzero(flat)
        return cls.at(places, flat[places], weight.shape)

    @classmethod
    def at(cls, places: npt.NDArray[np.int64], values: npt.NDArray[Any], shape: tuple[int, ...]) -> Sparse:
        """Entries at ascending places, counted along the rows; gaps in the type that needs fewer bytes."""
        forms = [_gaps(places, np.dtype(kind)) for kind in (np.uint8, np.uint16)]
        return cls(shape, values, min(forms, key=lambda gaps: gaps.nbytes))

    def dense(self) -> npt.NDArray[Any]:
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
        """Where the entries stand, counted along the rows."""
        reached = np.cumsum(self.gaps, dtype=np.int64)[self.gaps < _top(self.gaps.dtype)]
        return reached + np.arange(len(reached))


@dataclass(frozen=True, eq=False)
class LowRank:
    """A weight as two smaller ones, applied one after the other.

    W[h, c, …] = Σ_k outer[h, k, …] inner[k, c, …], where a kernel's size of 1 is spread along the other's. So
    a matrix is outer · inner; a convolution becomes one with its kernel to r channels and a 1 × 1 behind, or
    one along the height and one along the width.

    Parameters
    ----------
    outer : (h, r, …) array
    inner : (r, c, …) array
        Along each dimension of the kernel, one of the two has size 1.
    """

    outer: npt.NDArray[Any]
    inner: npt.NDArray[Any]

    def __post_init__(self) -> None:
        shapes = f"{self.outer.shape} and {self.inner.shape}"
        if not self.outer.ndim == self.inner.ndim >= 2 or self.outer.shape[1] != self.inner.shape[0]:
            raise DataError(f"expected factors of shapes (h, r, …) and (r, c, …), got {shapes}.")
        if not self.rank or any(min(pair) != 1 for pair in self._kernels):
            raise DataError(f"along a kernel's dimension one factor must have size 1, got {shapes}.")

    @property
    def rank(self) -> int:
        """r."""
        return len(self.inner)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (len(self.outer), self.inner.shape[1], *map(max, self._kernels))

    @property
    def _kernels(self) -> list[tuple[int, int]]:
        return [*zip(self.outer.shape[2:], self.inner.shape[2:], strict=True)]

    def dense(self) -> npt.NDArray[Any]:
        """The weight, multiplied out."""
        return np.asarray(np.einsum("hk...,kc...->hc...", self.outer, self.inner, optimize=True))

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.outer.nbytes + self.inner.nbytes

    @property
    def density(self) -> float:
        """Numbers of the factors as a share of the weight's."""
        return (self.outer.size + self.inner.size) / max(1, int(np.prod(self.shape, dtype=np.int64)))


Form = Sparse | LowRank | Int8


def _top(kind: np.dtype[Any]) -> int:
    """The number that means: so many zeros, and no entry yet."""
    return int(np.iinfo(kind).max)


def _gaps(places: npt.NDArray[np.int64], kind: np.dtype[Any]) -> Gaps:
    gaps, top = np.diff(places, prepend=-1) - 1, _top(kind)
    whole = gaps // top
    ends = np.cumsum(whole + 1) - 1
    coded = np.full(int(ends[-1]) + 1 if len(ends) else 0, top, kind)
    coded[ends] = gaps % top
    return coded
