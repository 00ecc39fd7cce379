"""Entropy coding of arrays of small integers: codes of weights, and gaps between them.

Huffman codes are canonical, and written and read by array operations: ordered by length, then by symbol, so
that their lengths say everything. In units of 2⁻⁵⁶ they begin at ascending numbers, and bits that follow a
code do not reach the next one: whoever reads looks for the last beginning that is not above.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pysolve.correlations import AnyArray
from pysolve.errors import DataError

Bytes = npt.NDArray[np.uint8]
Symbols = npt.NDArray[np.int32]
# Objects of constriction, which has no types.
Coder = Any
KINDS = ("ans", "huffman")
# Different numbers that one array may span.
_ALPHABET = 1 << 16
# Numbers that are counted at a time: NumPy makes 64-bit integers of them first.
_COUNT = 1 << 16
# Bytes that a stream of asymmetric numeral systems takes besides its entropy; symbols of a tree.
_WORDS, _TREE = 6, 4096
# Bits of the longest code. Optimal codes of fewer than 10¹¹ symbols are shorter.
_LONGEST = 56
# Bits that are looked up in a table; symbols written, and bytes read at a time.
_SHORT, _WRITE, _READ = 16, 1 << 17, 1 << 13


@dataclass(frozen=True, eq=False)
class Coded:
    """An array of ``length`` integers from ``low`` on in few bytes.

    ``data`` are 32-bit words of asymmetric numeral systems, or bytes of Huffman's codes; empty where all
    numbers are the same. ``table`` says of low, low + 1, … how often each occurs, relative to each other
    ("ans"), or how many bits its code has ("huffman"); 0 for those that do not occur. It is a row of at most
    65,536 uint8 or uint16.
    """

    data: AnyArray = field(repr=False)
    table: AnyArray = field(repr=False)
    length: int
    kind: str
    low: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"unknown kind of code {self.kind!r}; expected one of {', '.join(KINDS)}.")
        wanted = np.dtype(np.uint32 if self.kind == "ans" else np.uint8)
        if self.data.dtype != wanted or self.data.ndim != 1:
            raise DataError(f"expected a row of {wanted} as {self.kind} data, got {self.data.dtype}.")
        if self.table.dtype not in (np.uint8, np.uint16) or self.table.ndim != 1:
            raise DataError(f"expected a row of uint8 or uint16 as table, got {self.table.dtype}.")
        if len(self.table) > _ALPHABET or abs(self.low) >= 1 << 31:
            raise DataError(f"a table of {len(self.table)} numbers from {self.low} on is too large.")
        if self.length < 0 or bool(self.length) != bool(self.table.any()):
            raise DataError(f"{self.length} numbers do not go with a table of {len(self.table)}.")


def encode(codes: npt.ArrayLike, kind: str = "ans") -> Coded:
    """Code an array of integers that lie within 65,536 of each other; its shape is not kept.

    "ans", asymmetric numeral systems: within a few bytes of the entropy; ImportError without constriction.
    "huffman": whole bits a number.

    References
    ----------
    J. Duda, Asymmetric numeral systems, 2013. R. Bamler, constriction, 2022. D. A. Huffman, A method for the
    construction of minimum-redundancy codes, 1952.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}.")
    flat = np.asarray(codes).ravel()
    if flat.size and flat.dtype.kind not in "iu":
        raise TypeError(f"codes must be integers, got dtype {flat.dtype}.")
    low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
    if high - low >= _ALPHABET or max(abs(low), abs(high)) >= 1 << 31:
        raise ValueError(f"codes must lie within {_ALPHABET} of each other, got {low} … {high}.")
    if not flat.size:
        return Coded(np.zeros(0, np.uint32 if kind == "ans" else np.uint8), np.zeros(0, np.uint8), 0, kind)
    if kind == "huffman":
        symbols = _symbols(flat, low)
        table: AnyArray = huffman_lengths(counted(symbols, high - low + 1))
        return Coded(huffman_encode(symbols, table), table, flat.size, kind, low)
    # Bytes index the tables as they are.
    symbols = flat if flat.dtype == np.uint8 else _symbols(flat, low)
    first = low if symbols is flat else 0
    table = _frequencies(counted(symbols, first + high - low + 1)[first:])
    return Coded(_ans_encode(symbols, table, first), table, flat.size, kind, low)


def _symbols(flat: AnyArray, low: int) -> npt.NDArray[np.int32]:
    symbols = flat.astype(np.int32)
    if low:
        symbols -= np.int32(low)
    return symbols


def counted(symbols: AnyArray, span: int) -> npt.NDArray[np.int64]:
    """(span,) how often each of the numbers 0 … span − 1 occurs."""
    if symbols.dtype == np.uint8 and len(symbols) > 4 * _COUNT:
        # Two at a time.
        even = len(symbols) // 2 * 2
        pairs = counted(symbols[:even].view(np.uint16), 1 << 16).reshape(256, 256)
        counts: npt.NDArray[np.int64] = (pairs.sum(0) + pairs.sum(1))[:span]
        return counts + np.bincount(symbols[even:], minlength=span)
    counts = np.zeros(span, np.int64)
    step = max(_COUNT, 4 * span)
    for first in range(0, len(symbols), step):
        counts += np.bincount(symbols[first : first + step], minlength=span)
    return counts


def coded_bytes(counts: npt.NDArray[np.int64], kind: str) -> float:
    """About how many bytes ``encode`` makes of numbers with these counts, the table included."""
    used = counts[counts > 0]
    if len(used) <= 1:
        return float(len(counts))
    if kind == "ans":
        return _bits(counts, _frequencies(counts)) / 8 + _WORDS
    # The tree of a large alphabet takes longer than all the rest, and is hardly off the entropy.
    if len(used) > _TREE:
        return float(len(counts) + used @ np.log2(used.sum() / used) / 8)
    return float(len(counts) + used @ huffman_lengths(used) / 8)


def decode(coded: Coded, *, most: int) -> npt.NDArray[np.int32]:
    """The numbers again, exactly; DataError when there are more than ``most``, or no array was coded to them.

    Nothing larger than ``length`` numbers and the data is held.
    """
    if coded.length > most:
        raise DataError(f"{coded.length} coded numbers where at most {most} can be.")
    used = np.flatnonzero(coded.table)
    if len(used) <= 1:
        if len(coded.data):
            raise DataError(f"{coded.data.nbytes} bytes of data where all numbers are the same.")
        return np.full(coded.length, coded.low + used.sum(), np.int32)
    if coded.kind == "huffman":
        symbols = huffman_decode(coded.data, coded.table, coded.length)
    else:
        symbols = _ans_decode(coded.data, coded.table[used], coded.length)
        if len(used) < len(coded.table):
            symbols = used.astype(np.int32)[symbols]
    if coded.low:
        symbols += np.int32(coded.low)
    return symbols


def _frequencies(counts: npt.NDArray[np.int64]) -> AnyArray:
    """The counts in 8 or 16 bits, whichever makes table and data smaller together."""
    table = _scaled(counts, np.uint8)
    if counts.max(initial=0) <= np.iinfo(np.uint8).max:
        # The counts themselves: more bits would say nothing more.
        return table
    return min((table, _scaled(counts, np.uint16)), key=lambda t: _bits(counts, t))


def _scaled(counts: npt.NDArray[np.int64], kind: type[np.uint8 | np.uint16]) -> AnyArray:
    share = min(1.0, np.iinfo(kind).max / max(1, counts.max(initial=0)))
    return np.where(counts > 0, np.maximum(1, np.rint(counts * share)), 0).astype(kind)


def _bits(counts: npt.NDArray[np.int64], table: AnyArray) -> float:
    """Bits of the table, and of the numbers when coded by it."""
    used = table > 0
    chances = table[used] / table.sum(dtype=np.int64)
    return float(8 * table.nbytes - counts[used] @ np.log2(chances))


def _ans_encode(symbols: AnyArray, table: AnyArray, first: int) -> npt.NDArray[np.uint32]:
    used = np.flatnonzero(table)
    if len(used) <= 1:
        return np.zeros(0, np.uint32)
    if first or len(used) < len(table):
        ranks = np.zeros(first + len(table), np.int32)
        ranks[first + used] = np.arange(len(used), dtype=np.int32)
        symbols = ranks[symbols]
    coder, model = _ans(table[used])
    coder.encode_reverse(symbols.astype(np.int32, copy=False), model)
    return np.asarray(coder.get_compressed(), np.uint32)


def _ans_decode(data: npt.NDArray[np.uint32], frequencies: AnyArray, length: int) -> npt.NDArray[np.int32]:
    try:
        coder, model = _ans(frequencies, np.ascontiguousarray(data))
    except ValueError as error:
        raise DataError(f"these words are no coded numbers: {error}") from error
    symbols = np.asarray(coder.decode(model, length), np.int32)
    if not coder.is_empty():
        raise DataError(f"the data holds something else than the {length} numbers it should.")
    return symbols


def _ans(frequencies: AnyArray, *data: npt.NDArray[np.uint32]) -> tuple[Coder, Coder]:
    """A coder, and the model of numbers of these frequencies."""
    try:
        import constriction
    except ImportError as error:
        raise ImportError(
            "asymmetric numeral systems come with constriction, which is not installed: "
            "pip install 'pysolve-compress[coding]', or choose \"huffman\"."
        ) from error
    stack = constriction.stream
    chances = frequencies / frequencies.sum(dtype=np.int64)
    return stack.stack.AnsCoder(*data), stack.model.Categorical(chances, perfect=False)


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
        bits = np.concatenate([left, _bit_row(codes[part], lengths[part].astype(np.int64))])
        whole = len(bits) // 8 * 8
        pieces.append(np.packbits(bits[:whole]))
        left = bits[whole:]
    return np.concatenate([*pieces, np.packbits(left)])


def huffman_decode(data: Bytes, lengths: AnyArray, count: int) -> Symbols:
    """``count`` symbols. Raises DataError where the lengths are no code, or the data is not of that many."""
    _check_code(data, lengths, count)
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


def _check_code(data: Bytes, lengths: AnyArray, count: int) -> None:
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


def _bit_row(codes: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64]) -> Bytes:
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
