"""Canonical Huffman codes, written and read by array operations.

Codes are ordered by length, then by symbol, so that their lengths say everything. In units of 2⁻⁵⁶ they begin
at ascending numbers, and bits that follow a code do not reach the next one: whoever reads looks for the last
beginning that is not above.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pysolve.correlations import AnyArray
from pysolve.errors import DataError

Bytes = npt.NDArray[np.uint8]
Symbols = npt.NDArray[np.int32]

# Bits of the longest code. Optimal codes of fewer than 10¹¹ symbols are shorter.
_LONGEST = 56
# Bits that are looked up in a table; symbols written, and bytes read at a time.
_SHORT, _WRITE, _READ = 16, 1 << 17, 1 << 13


def huffman_lengths(counts: npt.NDArray[np.int64]) -> Bytes:
    """Bits of the best code for symbols of these counts; 0 where a count is 0."""
    lengths, used = np.zeros(len(counts), np.uint8), np.flatnonzero(counts)
    if len(used) <= 1:
        lengths[used] = 1
        return lengths
    order = used[np.argsort(counts[used], kind="stable")]
    weights: list[float] = counts[order].tolist()
    n, parents = len(order), [0] * (2 * len(order) - 1)
    # Leaves and pairs both ascend, so the two lightest are at the front of one or the other.
    leaf, pair = 0, n
    for new in range(n, 2 * n - 1):
        total = 0.0
        for _ in range(2):
            if pair >= new or (leaf < n and weights[leaf] <= weights[pair]):
                chosen, leaf = leaf, leaf + 1
            else:
                chosen, pair = pair, pair + 1
            parents[chosen] = new
            total += weights[chosen]
        weights.append(total)
    depths = [0] * (2 * n - 1)
    for node in range(2 * n - 3, -1, -1):
        depths[node] = depths[parents[node]] + 1
    lengths[order] = depths[:n]
    return lengths


def huffman_encode(symbols: Symbols, lengths: AnyArray) -> Bytes:
    """The codes of the symbols, one after the other; nothing where there is only one symbol."""
    if np.count_nonzero(lengths) <= 1:
        return np.zeros(0, np.uint8)
    order, begins = _canonical(lengths)
    codes = np.zeros(len(lengths), np.uint64)
    codes[order] = begins >> (_LONGEST - lengths[order].astype(np.uint64))
    pieces, left = [], np.zeros(0, np.uint8)
    for first in range(0, len(symbols), _WRITE):
        part = symbols[first : first + _WRITE]
        bits = np.concatenate([left, _bits(codes[part], lengths[part].astype(np.int64))])
        whole = len(bits) // 8 * 8
        pieces.append(np.packbits(bits[:whole]))
        left = bits[whole:]
    return np.concatenate([*pieces, np.packbits(left)])


def huffman_decode(data: Bytes, lengths: AnyArray, count: int) -> Symbols:
    """``count`` symbols. Raises DataError where the lengths are no code, or the data is not of that many."""
    _check(data, lengths, count)
    order, begins = _canonical(lengths)
    sizes = lengths[order].astype(np.int32)
    prefixes = np.arange(1 << _SHORT, dtype=np.uint64) << np.uint64(_LONGEST - _SHORT)
    ranks = np.searchsorted(begins, prefixes, side="right") - 1
    short = np.where(sizes[ranks] <= _SHORT, sizes[ranks], 0).astype(np.int32)
    padded = np.concatenate([data, np.zeros(16, np.uint8)])
    found, done, cursor = np.empty(count, np.int32), 0, 0
    while done < count:
        first = cursor // 8
        if first >= len(data):
            raise DataError(f"the data ends after {done} of {count} numbers.")
        part = padded[first : first + _READ + 16]
        places, end, windows, long = _chain(part, cursor - 8 * first, short, begins, sizes)
        places = places[: count - done]
        at = ranks[windows[places]]
        if len(long):
            hits = np.flatnonzero(short[windows[places]] == 0)
            at[hits] = _long_ranks(part, places[hits], begins)
        found[done : done + len(places)] = order[at]
        done += len(places)
        cursor = 8 * first + (end if done < count else int(places[-1] + sizes[at[-1]]))
    if (cursor + 7) // 8 != len(data):
        raise DataError(f"{len(data)} bytes of data where {count} numbers take {(cursor + 7) // 8}.")
    return found


def _check(data: Bytes, lengths: AnyArray, count: int) -> None:
    if lengths.max() > _LONGEST:
        raise DataError(f"Huffman codes of {lengths.max()} bits; at most {_LONGEST} are possible.")
    # In Python's integers, for many short codes overflow any other.
    filled = sum(int(n) << (_LONGEST - bits) for bits, n in enumerate(np.bincount(lengths)) if bits)
    if filled != 1 << _LONGEST:
        raise DataError("these lengths belong to no Huffman code: their codes do not fill all bits.")
    if 8 * len(data) < count:
        raise DataError(f"{len(data)} bytes cannot hold {count} Huffman codes.")


def _canonical(lengths: AnyArray) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint64]]:
    """Symbols in the order of their codes, and where those begin."""
    used = np.flatnonzero(lengths)
    order = used[np.argsort(lengths[used], kind="stable")]
    spans = np.uint64(1) << (_LONGEST - lengths[order].astype(np.uint64))
    return order, np.cumsum(spans, dtype=np.uint64) - spans


def _bits(codes: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64]) -> Bytes:
    """One number a bit."""
    ends = np.cumsum(lengths)
    bits = np.empty(int(ends[-1]), np.uint8)
    # From the last bit of every code on, so that codes that have none left drop out.
    while len(ends):
        ends -= 1
        bits[ends] = codes & np.uint64(1)
        lengths = lengths - 1
        more = lengths > 0
        codes, ends, lengths = codes[more] >> np.uint64(1), ends[more], lengths[more]
    return bits


def _chain(
    part: Bytes,
    cursor: int,
    short: npt.NDArray[np.int32],
    begins: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.int32], int, AnyArray, npt.NDArray[np.intp]]:
    """Beginnings of codes among the bits of a part, and in the next part, from the beginning of the first.

    Every bit's code, if one began there, says where the next begins. Those steps are doubled four times, a
    loop takes every sixteenth, and the ones between follow.
    """
    n = 8 * (len(part) - 16)
    words = part.astype(np.uint32)
    words = words[:-2] << np.uint32(16) | words[1:-1] << np.uint32(8) | words[2:]
    windows = (words[: n // 8, None] >> np.arange(8, 0, -1, dtype=np.uint32)).astype(np.uint16).ravel()
    steps = short.take(windows)
    long = np.flatnonzero(steps == 0)
    steps[long] = sizes[_long_ranks(part, long, begins)]
    jumps = [np.arange(n + _LONGEST + 1, dtype=np.int32)]
    jumps[0][:n] += steps
    for _ in range(4):
        jumps.append(jumps[-1].take(jumps[-1]))
    starts = []
    while cursor < n:
        starts.append(cursor)
        cursor = jumps[-1].item(cursor)
    places = np.array(starts, np.int32)
    for jump in jumps[-2::-1]:
        places = np.stack([places, jump[places]], axis=1).ravel()
    return places[places < n], cursor, windows, long


def _long_ranks(part: Bytes, places: AnyArray, begins: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """Ranks of the codes that begin at some bits, from the 56 bits that follow."""
    value = np.zeros(len(places), np.uint64)
    for i in range(8):
        value = value << np.uint64(8) | part[places // 8 + i]
    value = (value << (places % 8).astype(np.uint64)) >> np.uint64(64 - _LONGEST)
    return np.searchsorted(begins, value, side="right") - 1
