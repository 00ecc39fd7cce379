"""Entropy coding of arrays of small integers: codes of weights, and gaps between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pysolve.correlations import AnyArray
from pysolve.errors import DataError
from pysolve.nn.files.huffman import huffman_decode, huffman_encode, huffman_lengths

# Objects of constriction, which has no types.
Coder = Any
KINDS = ("ans", "huffman")
# Different numbers that one array may span.
_ALPHABET = 1 << 16
# Numbers that are counted at a time: NumPy makes 64-bit integers of them first.
_COUNT = 1 << 16
# Bytes that a stream of asymmetric numeral systems takes besides its entropy; symbols of a tree.
_WORDS, _TREE = 6, 4096


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
    return min((_scaled(counts, kind) for kind in (np.uint8, np.uint16)), key=lambda t: _bits(counts, t))


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
            "pip install 'pysolve[coding]', or choose \"huffman\"."
        ) from error
    stack = constriction.stream
    chances = frequencies / frequencies.sum(dtype=np.int64)
    return stack.stack.AnsCoder(*data), stack.model.Categorical(chances, perfect=False)
