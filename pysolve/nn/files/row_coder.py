"""Rows of integers in the fewest bytes, and back from bytes that nobody vouches for.

A row is described by plain values that JSON can hold, and bytes that belong to them, in the same order:

- a number: all entries are this one; no bytes;
- ``"r"``: the entries, least byte first;
- ``["a" or "h", low, n, width, m]``: entropy-coded (see ``pysolve.nn.files.entropy``): a table of n
  numbers of ``width`` bytes for low, low + 1, …, and m bytes of data;
- ``["z", m]``: m bytes of raw deflate, of entries of one byte;
- ``["t", k, table, codes]``: k different entries, ascending, and which of them each one is, in one byte where
  k ≤ 256, else two; table and codes are rows themselves;
- ``["p", row, …]``: the bytes of the entries apart, first all the least ones;
- ``["g", width, n, gaps, values]``: the entries that are not 0, with n gaps of ``width`` bytes between them,
  as ``pysolve.forms.Sparse`` counts them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pysolve.errors import DataError
from pysolve.forms import Sparse
from pysolve.nn.files.entropy import Coded, coded_bytes, counted, decode, encode
from pysolve.nn.files.plan_json import typed
from pysolve.nn.files.storage import inflated

Row = npt.NDArray[np.unsignedinteger]
Bytes = npt.NDArray[np.uint8]
# What JSON holds of a row.
Description = int | str | list["Description"]
Kind = np.dtype[Any]
# Factor and shift of v ↦ v · factor >> shift, in the type of the values.
Hash = tuple[np.unsignedinteger, np.unsignedinteger]
# Ways that are open to a row, and to the rows within it.
ALL = "tpg"
# About what a description takes in the file, in bytes.
_WORD, _LIST = 2, 8
# The bytes of floating-point numbers are taken apart only for this much.
_WORTH = 0.95
# Rows that long are looked at by a sample first; above this share of the bytes it does not pay.
_LONG, _HOPELESS = 1 << 15, 0.98
# Entries for each different one, from which on a table is best.
_REPEATED = 64
# Different numbers that a long row may span.
_SPAN = 1 << 12
# The largest share of entries that the zeros between them pay for, in rows of single bytes and of more.
_DENSEST = {1: 0.5, 2: 0.8, 4: 0.95, 8: 0.95}
# As many as codes can tell apart.
_MOST = 1 << 16
# Entries that are looked at first; the share of them that may differ for the row to have few values.
_SAMPLE, _FEW = 1 << 15, 0.98
# To look up more than these in a long row takes longer than they save beside the bytes apart.
_MANY = 2048
# Entries at a time: they stay in the cache.
_CHUNK = 1 << 16
# Up to so many values a table without collisions is soon found.
_HASHED, _TRIES = 384, 64
# Rows within rows: entries, of few values, in a table, whose bytes are apart, coded.
_DEEPEST = 5
_KINDS = {"a": "ans", "h": "huffman"}


@dataclass(frozen=True, eq=False)
class Part:
    """A way to write a row, in about ``size`` bytes.

    ``head`` is the description, without those of ``parts``, the rows within, and the coder's numbers; ``row``
    are the numbers that are written raw ("r") or entropy-coded ("a", "h", "z").
    """

    size: float
    head: int | str | list[Description]
    row: Row | None = field(default=None, repr=False)
    parts: tuple[Part, ...] = ()


def fitted(row: Row, kind: str, ways: str = ALL) -> Part:
    """The way to write a row of unsigned integers in the fewest bytes, of the ``ways`` that are open."""
    if not row.size or row.min() == row.max():
        value = int(row[0]) if row.size else 0
        return Part(len(str(value)), value)
    return min(_ways(row, kind, ways), key=lambda part: part.size)


def gapped(form: Sparse, kind: str, ways: str = ALL) -> Part:
    """Entries and the gaps between them."""
    parts = fitted(form.gaps, kind, ""), fitted(form.values, kind, ways.replace("g", ""))
    return _joined(["g", form.gaps.itemsize, len(form.gaps)], *parts)


def written(part: Part, out: list[Bytes]) -> Description:
    """The description of a part, whose bytes are put at the end of ``out``."""
    if part.row is None:
        rows = [written(one, out) for one in part.parts]
        return [*part.head, *rows] if isinstance(part.head, list) else part.head
    if part.head == "r":
        out.append(part.row.view(np.uint8))
        return "r"
    if part.head == "z":
        packer = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=zlib.Z_HUFFMAN_ONLY)
        data = packer.compress(part.row.data) + packer.flush()
        out.append(np.frombuffer(data, np.uint8))
        return ["z", len(data)]
    coded = encode(part.row, "ans" if part.head == "a" else "huffman")
    out += [coded.table.view(np.uint8), coded.data.view(np.uint8)]
    return [part.head, coded.low, len(coded.table), coded.table.itemsize, coded.data.nbytes]


def _ways(row: Row, kind: str, ways: str) -> Iterator[Part]:
    yield Part(row.nbytes + _WORD, "r", row)
    short = len(row) <= _LONG
    if row.itemsize <= 2 and (short or _hopeful(row, kind)):
        yield Part(_coded_size(row, kind), kind[0], row)
    # For bytes, a table of values saves no more than the unused entries of the coder's table.
    few = distinct(row) if "t" in ways and (short or row.itemsize > 1) else None
    if few is not None:
        yield _table_part(*few, kind, ways)
    # Of a few values, their codes say more than their bytes, and have the same zeros.
    if few is not None and len(few[0]) <= len(row) // _REPEATED:
        return
    if "p" in ways and row.itemsize > 1:
        yield from _plane_parts(row, kind, ways)
    if "g" in ways and np.count_nonzero(row) <= _DENSEST[row.itemsize] * len(row):
        yield gapped(Sparse.from_dense(row), kind, ways)


def _hopeful(row: Row, kind: str) -> bool:
    """Whether a sample of a long row can be coded, and by a table that does not take long."""
    some = sample(row)
    return int(np.ptp(some)) < _SPAN and _coded_size(some, kind) < _HOPELESS * some.nbytes


def _coded_size(row: Row, kind: str) -> float:
    low, high = int(row.min()), int(row.max())
    return coded_bytes(counted(row - low if low else row, high - low + 1), kind) + _LIST


def _table_part(table: Row, codes: Row, kind: str, ways: str) -> Part:
    rows = fitted(table, kind, ways.replace("g", "").replace("t", "")), fitted(codes, kind, ways.strip("tp"))
    return _joined(["t", len(table)], *rows)


def _plane_parts(row: Row, kind: str, ways: str) -> Iterator[Part]:
    """The bytes apart, where that is worth it."""
    within = ways.replace("p", "")
    if len(row) <= _LONG:
        part = _joined(["p"], *(fitted(one, kind, within) for one in _bytes(row)))
    else:
        some = _bytes(sample(row))
        ways_by_plane = [_plane_way(one, kind, len(row) / len(one)) for one in some]
        if sum(size for size, _ in ways_by_plane) > _WORTH * row.nbytes:
            return
        planes = zip(_bytes(row), ways_by_plane, strict=True)
        part = _joined(
            ["p"],
            *(Part(size, head, one) if head else fitted(one, kind, within) for one, (size, head) in planes),
        )
    if part.size < _WORTH * row.nbytes:
        yield part


def _plane_way(some: Row, kind: str, times: float) -> tuple[float, str]:
    """About how many bytes a long row takes of which this is a sample, and in which way; "" for any."""
    if 2 * np.bincount(some).max() > len(some):
        return times * _coded_size(some, kind), ""
    # The bytes of all weights of a large network: deflate is hardly larger, and many times as fast.
    size = times * _coded_size(some, "huffman")
    return (size, "z") if size < _WORTH * times * len(some) else (times * len(some), "r")


def _bytes(row: Row) -> list[Bytes]:
    """The bytes of the entries apart, first all the least ones."""
    entries = row.view(np.uint8).reshape(len(row), row.itemsize)
    return [entries[:, i].copy() for i in range(row.itemsize)]


def _joined(head: list[Description], *parts: Part) -> Part:
    """A row that is described by others."""
    return Part(_LIST + sum(part.size for part in parts), head, None, parts)


def sample(row: Row) -> Row:
    """Entries of a long row, drawn at random, the same each time."""
    if len(row) <= _SAMPLE:
        return row
    return row[np.random.default_rng(0).integers(0, len(row), _SAMPLE)]


def distinct(row: Row) -> tuple[Row, Row] | None:
    """The different entries, ascending, and their codes: for each entry which it is, as uint8 or uint16.

    None where there are more than 65,536 or hardly any entry occurs twice, or where a sample of a long row
    has more than 2,048.
    """
    some = sample(row)
    table, counts = np.unique(some, return_counts=True)
    # All of the most frequent value count once: it may be zero.
    if len(table) > min(_MOST, 1 + _FEW * (len(some) - counts.max())):
        return None
    if len(some) == len(row):
        return table, _searched(row, table)
    if len(table) > _MANY:
        return None
    for _ in range(2):
        hashing = _hashing(table) if len(table) <= _HASHED else None
        if hashing is None:
            break
        codes, strangers = _hashed(row, table, hashing)
        if not len(strangers):
            return table, codes
        table = np.union1d(table, strangers)
    table = np.unique(row)
    return (table, _searched(row, table)) if len(table) <= _MOST else None


def _code_type(table: Row) -> type[np.uint8 | np.uint16]:
    return np.uint8 if len(table) <= 256 else np.uint16


def _searched(row: Row, table: Row) -> Row:
    """Codes of the entries by binary search."""
    codes: Row = np.empty(len(row), _code_type(table))
    for first in range(0, len(row), _CHUNK):
        codes[first : first + _CHUNK] = np.searchsorted(table, row[first : first + _CHUNK])
    return codes


def _hashing(table: Row) -> Hash | None:
    """A hash that takes all values of the table to different numbers below 65,536."""
    kind, rng = table.dtype.type, np.random.default_rng(0)
    if table.itemsize <= 2:
        return kind(1), kind(0)
    shift = kind(8 * table.itemsize - 16)
    for _ in range(_TRIES):
        factor = rng.integers(0, np.iinfo(kind).max, dtype=kind) | kind(1)
        if len(np.unique(table * factor >> shift)) == len(table):
            return factor, shift
    return None


def _hashed(row: Row, table: Row, by: Hash) -> tuple[Row, Row]:
    """Codes of the entries, and the entries that the table lacks."""
    factor, shift = by
    places: Row = np.zeros(1 << 16, _code_type(table))
    places[table * factor >> shift] = np.arange(len(table))
    codes, strangers = np.empty(len(row), places.dtype), [row[:0]]
    for first in range(0, len(row), _CHUNK):
        part = row[first : first + _CHUNK]
        found = places[(part * factor >> shift).astype(np.uint16)]
        codes[first : first + _CHUNK] = found
        wrong = table[found] != part
        if wrong.any():
            strangers.append(np.unique(part[wrong]))
    return codes, np.concatenate(strangers)


@dataclass(eq=False)
class Stream:
    """Bytes that are taken one part after the other; the only thing here that changes."""

    data: Bytes
    at: int = 0

    def take(self, count: int, kind: npt.DTypeLike) -> Row:
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


def row_of(description: object, stream: Stream, size: int, kind: npt.DTypeLike, depth: int = _DEEPEST) -> Row:
    """A row of ``size`` unsigned integers from its description and the next bytes.

    Raises DataError when it is not the description of such a row; nothing larger than it and the bytes is
    held before. ImportError when it needs constriction, which is not installed.
    """
    dtype = np.dtype(kind)
    if type(description) is int:
        if not 0 <= description <= np.iinfo(dtype).max:
            raise DataError(f"{str(description)[:40]} is no number of {dtype}.")
        return np.full(size, description, dtype)
    if description == "r":
        return stream.take(size, dtype)
    head, *rest = typed(description, list, "a row") or [None]
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
    raise DataError(f"unknown way to write {dtype}: {str(description)[:40]}.")


def gapped_of(description: object, stream: Stream, shape: tuple[int, ...], kind: npt.DTypeLike) -> Sparse:
    """Entries and gaps of a row that is described by both; errors as ``row_of``."""
    if not isinstance(description, list) or description[:1] != ["g"]:
        raise DataError(f"expected entries and gaps between them, got {str(description)[:40]}.")
    return _gapped(description[1:], stream, shape, np.dtype(kind), _DEEPEST)


def _coded(head: str, rest: list[object], stream: Stream, size: int, dtype: Kind) -> Row:
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


def _tabled(rest: list[object], stream: Stream, size: int, dtype: Kind, depth: int) -> Row:
    (count,) = _integers(rest[:1], 1)
    if not 1 <= count <= min(size, 1 << 16) or len(rest) != 3:
        raise DataError(f"a table of {count} values does not go with {size} entries.")
    table = row_of(rest[1], stream, count, dtype, depth - 1)
    codes = row_of(rest[2], stream, size, np.uint8 if count <= 256 else np.uint16, depth - 1)
    if codes.max() >= count:
        raise DataError(f"value {codes.max()} of a table of {count}.")
    return table.take(codes)


def _planes(rest: list[object], stream: Stream, size: int, dtype: Kind, depth: int) -> Row:
    if len(rest) != dtype.itemsize:
        raise DataError(f"expected the {dtype.itemsize} bytes of {dtype}, got {len(rest)}.")
    entries = np.empty((size, dtype.itemsize), np.uint8)
    for i, description in enumerate(rest):
        entries[:, i] = row_of(description, stream, size, np.uint8, depth - 1)
    return entries.view(dtype).ravel()


def _gapped(rest: list[object], stream: Stream, shape: tuple[int, ...], dtype: Kind, depth: int) -> Sparse:
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


def _integers(values: Sequence[object], count: int) -> list[int]:
    """The values, if they are so many integers; else DataError."""
    found = [value for value in values if type(value) is int]
    if not len(found) == len(values) == count:
        raise DataError(f"expected {count} integers, got {str(values)[:40]}.")
    return found
