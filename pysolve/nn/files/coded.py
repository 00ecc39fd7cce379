"""Rows of whole numbers in the fewest bytes: the ways to write one, and which of them to take.

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

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pysolve.forms import Sparse
from pysolve.nn.files.distinct import distinct, sample
from pysolve.nn.files.entropy import coded_bytes, counted, encode

Row = npt.NDArray[np.unsignedinteger[Any]]
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


@dataclass(frozen=True, eq=False)
class Part:
    """A way to write a row.

    Parameters
    ----------
    size : float
        About how many bytes.
    head : number, "r" or list
        The description, but for what follows from ``parts`` and coding.
    row : array, optional
        What is written raw ("r") or entropy-coded ("a", "h", "z").
    parts : tuple of Part
        The rows within.
    """

    size: float
    head: Any
    row: Row | None = field(default=None, repr=False)
    parts: tuple[Part, ...] = ()


def fitted(row: Row, kind: str, ways: str = ALL) -> Part:
    """The way that takes the fewest bytes.

    Parameters
    ----------
    row : (n,) array of unsigned integers
    kind : "ans" or "huffman"
    ways : str
        Which of "t", "p" and "g" are open.
    """
    if not row.size or row.min() == row.max():
        value = int(row[0]) if row.size else 0
        return Part(len(str(value)), value)
    return min(_ways(row, kind, ways), key=lambda part: part.size)


def gapped(form: Sparse, kind: str, ways: str = ALL) -> Part:
    """Entries and the gaps between them."""
    parts = fitted(form.gaps, kind, ""), fitted(form.values, kind, ways.replace("g", ""))
    return _joined(["g", form.gaps.itemsize, len(form.gaps)], *parts)


def written(part: Part, out: list[npt.NDArray[np.uint8]]) -> Any:
    """The description of a part, whose bytes are put at the end of ``out``."""
    if part.row is None:
        rows = [written(one, out) for one in part.parts]
        return [*part.head, *rows] if rows else part.head
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
    # Of bytes, a table saves only what is left free between them in the other one.
    few = distinct(row) if "t" in ways and (short or row.itemsize > 1) else None
    if few is not None:
        yield _tabled(*few, kind, ways)
    # Of a few values, their codes say more than their bytes, and have the same zeros.
    if few is not None and len(few[0]) <= len(row) // _REPEATED:
        return
    if "p" in ways and row.itemsize > 1:
        yield from _planes(row, kind, ways)
    if "g" in ways and np.count_nonzero(row) <= _DENSEST[row.itemsize] * len(row):
        yield gapped(Sparse.from_dense(row), kind, ways)


def _hopeful(row: Row, kind: str) -> bool:
    """Whether a sample of a long row can be coded, and by a table that does not take long."""
    some = sample(row)
    return int(np.ptp(some)) < _SPAN and _coded_size(some, kind) < _HOPELESS * some.nbytes


def _coded_size(row: Row, kind: str) -> float:
    low, high = int(row.min()), int(row.max())
    return coded_bytes(counted(row - low if low else row, high - low + 1), kind) + _LIST


def _tabled(table: Row, codes: Row, kind: str, ways: str) -> Part:
    rows = fitted(table, kind, ways.replace("g", "").replace("t", "")), fitted(codes, kind, ways.strip("tp"))
    return _joined(["t", len(table)], *rows)


def _planes(row: Row, kind: str, ways: str) -> Iterator[Part]:
    """The bytes apart, where that is worth it."""
    within = ways.replace("p", "")
    if len(row) <= _LONG:
        part = _joined(["p"], *(fitted(one, kind, within) for one in _bytes(row)))
    else:
        some = _bytes(sample(row))
        told = [_plane(one, kind, len(row) / len(one)) for one in some]
        if sum(size for size, _ in told) > _WORTH * row.nbytes:
            return
        planes = zip(_bytes(row), told, strict=True)
        part = _joined(["p"], *(_given(one, *how, kind, within) for one, how in planes))
    if part.size < _WORTH * row.nbytes:
        yield part


def _plane(some: Row, kind: str, times: float) -> tuple[float, str]:
    """About how many bytes a long row takes of which this is a sample, and the way; "" for any."""
    if 2 * np.bincount(some).max() > len(some):
        return times * _coded_size(some, kind), ""
    # The bytes of all weights of a large network: deflate is hardly larger, and many times as fast.
    size = times * _coded_size(some, "huffman")
    return (size, "z") if size < _WORTH * times * len(some) else (times * len(some), "r")


def _given(row: Row, size: float, head: str, kind: str, ways: str) -> Part:
    return Part(size, head, row) if head else fitted(row, kind, ways)


def _bytes(row: Row) -> list[npt.NDArray[np.uint8]]:
    entries = row.view(np.uint8).reshape(len(row), row.itemsize)
    return [entries[:, i].copy() for i in range(row.itemsize)]


def _joined(head: list[Any], *parts: Part) -> Part:
    return Part(_LIST + sum(part.size for part in parts), head, None, parts)
