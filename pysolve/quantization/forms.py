"""Quantised weights as they are stored, and what they cost in bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pysolve.errors import DataError


@dataclass(frozen=True, eq=False)
class Codebook:
    """A weight as numbers of the values that its entries share.

    Parameters
    ----------
    codes : uint8 array
        Of the weight's shape.
    centroids : (k,) array
        The values of codes 0, 1, …; at most 256.
    """

    codes: npt.NDArray[np.uint8]
    centroids: npt.NDArray[Any]

    def __post_init__(self) -> None:
        if self.codes.dtype != np.uint8:
            raise DataError(f"expected codes of uint8, got {self.codes.dtype}.")
        if self.centroids.ndim != 1 or not 1 <= len(self.centroids) <= 256:
            raise DataError(f"expected a row of 1 … 256 centroids, got shape {self.centroids.shape}.")
        most = int(self.codes.max(initial=0))
        if most >= len(self.centroids):
            raise DataError(f"there is a code {most}, but only {len(self.centroids)} centroids.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.codes.shape

    @property
    def bits(self) -> int:
        """Of a code."""
        return max(1, (len(self.centroids) - 1).bit_length())

    def dense(self) -> npt.NDArray[Any]:
        """The weight again."""
        return np.asarray(self.centroids[self.codes])

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and of the centroids."""
        return _packed_bytes(self.codes.size, self.bits) + self.centroids.nbytes

    def with_codes(self, codes: npt.NDArray[Any]) -> Self:
        """The same with other codes, or with these in another shape."""
        return replace(self, codes=codes)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all that is stored, over the entries of the weight."""
        return 8 * self.nbytes / max(1, self.codes.size)


@dataclass(frozen=True, eq=False)
class Int8:
    """A weight as small whole numbers: (codes − zeros) · scales.

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
    scales: npt.NDArray[Any]
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
                raise DataError(f"there are codes beyond −{top} … {top - 1}, what {self.bits} bits hold.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.codes.shape

    @property
    def _columns(self) -> int:
        return int(np.prod(self.codes.shape[1:], dtype=np.int64))

    @property
    def _group(self) -> int:
        return self.group or max(1, self._columns)

    def dense(self) -> npt.NDArray[Any]:
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

    def with_codes(self, codes: npt.NDArray[Any]) -> Self:
        """The same with other codes, or with these in another shape."""
        return replace(self, codes=codes)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all that is stored, over the entries of the weight."""
        return 8 * self.nbytes / max(1, self.codes.size)


QuantForm = Codebook | Int8


def pack(codes: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """The lowest bits of whole numbers, one number after the other."""
    rows = np.unpackbits(codes.astype(np.uint8).ravel()[:, None], axis=1)
    return np.packbits(rows[:, 8 - bits :])


def unpack(data: npt.NDArray[np.uint8], bits: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The numbers that ``pack`` took, without sign. Raises DataError if the data is not of that many."""
    size = int(np.prod(shape, dtype=np.int64))
    if len(data) != _packed_bytes(size, bits):
        raise DataError(f"{len(data)} bytes do not hold {size} codes of {bits} bits.")
    rows = np.unpackbits(data, count=size * bits).reshape(size, bits)
    return np.packbits(np.pad(rows, ((0, 0), (8 - bits, 0))), axis=1).reshape(shape)


def _packed_bytes(size: int, bits: int) -> int:
    return -(-size * bits // 8)
