"""Rows of whole numbers from their descriptions and bytes, neither of which anybody vouches for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pysolve.errors import DataError
from pysolve.forms import Sparse
from pysolve.nn.files.entropy import Coded, decode
from pysolve.nn.files.plan_json import typed
from pysolve.nn.files.zipped import inflated

Row = npt.NDArray[np.unsignedinteger[Any]]
# Rows within rows: entries, of few values, in a table, whose bytes are apart, coded.
_DEEPEST = 5
_KINDS = {"a": "ans", "h": "huffman"}


@dataclass(eq=False)
class Stream:
    """Bytes that are taken one part after the other; the only thing here that changes."""

    data: npt.NDArray[np.uint8]
    at: int = 0

    def take(self, count: int, kind: npt.DTypeLike) -> npt.NDArray[Any]:
        """The next numbers, least byte first, as an array of its own."""
        found = np.dtype(kind)
        end = self.at + count * found.itemsize
        if count < 0 or end > len(self.data):
            left = len(self.data) - self.at
            raise DataError(f"expected {count} numbers of {found} more, but {left} bytes are left.")
        # A copy, for parts begin anywhere.
        part = np.frombuffer(self.data[self.at : end].tobytes(), found).copy()
        self.at = end
        return part


def row_of(told: Any, stream: Stream, size: int, kind: npt.DTypeLike, depth: int = _DEEPEST) -> Row:
    """A row of ``size`` unsigned integers from its description, see ``files.coded``, and the next bytes.

    Raises
    ------
    DataError
        When it is not the description of such a row. Nothing larger than it and the bytes is held before.
    ImportError
        When it needs constriction, which is not installed.
    """
    dtype = np.dtype(kind)
    if type(told) is int:
        if not 0 <= told <= np.iinfo(dtype).max:
            raise DataError(f"{str(told)[:40]} is no number of {dtype}.")
        return np.full(size, told, dtype)
    if told == "r":
        return stream.take(size, dtype)
    head, *rest = typed(told, list, "a row") or [None]
    if depth > 0 and head in ("a", "h") and dtype.itemsize <= 2:
        return _coded(head, rest, stream, size, dtype)
    if depth > 0 and head == "z" and dtype.itemsize == 1:
        (length,) = _integers(rest, 1)
        return np.frombuffer(inflated(stream.take(length, np.uint8).tobytes(), size), np.uint8).copy()
    if depth > 0 and head == "t":
        return _tabled(rest, stream, size, dtype, depth)
    if depth > 0 and head == "p" and dtype.itemsize > 1:
        return _planes(rest, stream, size, dtype, depth)
    if depth > 0 and head == "g":
        return _gapped(rest, stream, (size,), dtype, depth).dense()
    raise DataError(f"unknown way to write {dtype}: {str(told)[:40]}.")


def gapped_of(told: Any, stream: Stream, shape: tuple[int, ...], kind: npt.DTypeLike) -> Sparse:
    """Entries and gaps of a row that is described by both; errors as ``row_of``."""
    if not isinstance(told, list) or told[:1] != ["g"]:
        raise DataError(f"expected entries and gaps between them, got {str(told)[:40]}.")
    return _gapped(told[1:], stream, shape, np.dtype(kind), _DEEPEST)


def _coded(head: str, rest: list[Any], stream: Stream, size: int, dtype: np.dtype[Any]) -> Row:
    low, count, width, length = _integers(rest, 4)
    if width not in (1, 2) or low < 0 or low + count - 1 > np.iinfo(dtype).max:
        raise DataError(f"{count} coded numbers of {width} bytes from {low} on are not {dtype}.")
    table = stream.take(count, f"u{width}")
    if head == "a":
        data = stream.take(length // 4, np.uint32) if length % 4 == 0 else table[:0]
    else:
        data = stream.take(length, np.uint8)
    coded = Coded(data, table, size, _KINDS[head], low)
    return decode(coded, most=size).astype(dtype)


def _tabled(rest: list[Any], stream: Stream, size: int, dtype: np.dtype[Any], depth: int) -> Row:
    (count,) = _integers(rest[:1], 1)
    if not 1 <= count <= min(size, 1 << 16) or len(rest) != 3:
        raise DataError(f"a table of {count} values does not go with {size} entries.")
    table = row_of(rest[1], stream, count, dtype, depth - 1)
    codes = row_of(rest[2], stream, size, np.uint8 if count <= 256 else np.uint16, depth - 1)
    if codes.max() >= count:
        raise DataError(f"value {codes.max()} of a table of {count}.")
    return table.take(codes)


def _planes(rest: list[Any], stream: Stream, size: int, dtype: np.dtype[Any], depth: int) -> Row:
    if len(rest) != dtype.itemsize:
        raise DataError(f"expected the {dtype.itemsize} bytes of {dtype}, got {len(rest)}.")
    entries = np.empty((size, dtype.itemsize), np.uint8)
    for i, told in enumerate(rest):
        entries[:, i] = row_of(told, stream, size, np.uint8, depth - 1)
    return entries.view(dtype).ravel()


def _gapped(
    rest: list[Any], stream: Stream, shape: tuple[int, ...], dtype: np.dtype[Any], depth: int
) -> Sparse:
    width, count = _integers(rest[:2], 2)
    if width not in (1, 2) or len(rest) != 4:
        raise DataError(f"expected gaps of one or two bytes, got {str(rest)[:40]}.")
    places = math.prod(shape)
    # Full gaps hold zeros alone.
    most = places + places // np.iinfo(f"u{width}").max
    if not 0 <= count <= most:
        raise DataError(f"expected at most {most} gaps, got {count}.")
    gaps = row_of(rest[2], stream, count, f"u{width}", depth - 1)
    ends = int(np.count_nonzero(gaps < np.iinfo(gaps.dtype).max))
    if ends > places:
        raise DataError(f"expected at most {places} entries, got {ends}.")
    return Sparse(shape, row_of(rest[3], stream, ends, dtype, depth - 1), gaps)


def _integers(values: list[Any], count: int) -> list[int]:
    if len(values) != count or any(type(value) is not int for value in values):
        raise DataError(f"expected {count} integers, got {str(values)[:40]}.")
    return values
