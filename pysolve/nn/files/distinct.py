"""The different entries of a row, and which of them each one is, where they are few."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.unsignedinteger[Any]]

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
        codes, strangers = _hashed(row, table, *hashing)
        if not len(strangers):
            return table, codes
        table = np.union1d(table, strangers)
    table = np.unique(row)
    return (table, _searched(row, table)) if len(table) <= _MOST else None


def _kind(table: Row) -> type[np.uint8 | np.uint16]:
    return np.uint8 if len(table) <= 256 else np.uint16


def _searched(row: Row, table: Row) -> Row:
    codes = np.empty(len(row), _kind(table))
    for first in range(0, len(row), _CHUNK):
        codes[first : first + _CHUNK] = np.searchsorted(table, row[first : first + _CHUNK])
    return codes


def _hashing(table: Row) -> tuple[Any, Any] | None:
    """A factor and a shift that take all values of the table to different numbers below 65,536."""
    kind, rng = table.dtype.type, np.random.default_rng(0)
    if table.itemsize <= 2:
        return kind(1), kind(0)
    shift = kind(8 * table.itemsize - 16)
    for _ in range(_TRIES):
        factor = rng.integers(0, np.iinfo(kind).max, dtype=kind) | kind(1)
        if len(np.unique(table * factor >> shift)) == len(table):
            return factor, shift
    return None


def _hashed(row: Row, table: Row, factor: Any, shift: Any) -> tuple[Row, Row]:
    """Codes of the entries, and the entries that the table lacks."""
    places = np.zeros(1 << 16, _kind(table))
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
