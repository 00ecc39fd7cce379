"""Coded numbers come back exactly, take as few bytes as they can, and lies about them are found out."""

import heapq
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from pysolve.errors import DataError
from pysolve.forms import Sparse
from pysolve.nn.files import entropy
from pysolve.nn.files.entropy import KINDS, Coded, decode, encode, huffman_lengths

kinds = st.sampled_from(KINDS)


@st.composite
def arrays(draw):
    """Skewed and even, few numbers and many, negative ones, alphabets with holes, of 1 to 65,536."""
    rng = np.random.default_rng(draw(seeds))
    span = draw(st.sampled_from([1, 2, 3, 16, 255, 256, 5000, 1 << 16]))
    size = draw(st.sampled_from([0, 1, 2, 50, 3000]))
    skew = draw(st.sampled_from([1.0, 4.0, 30.0]))
    low = draw(st.sampled_from([0, -3, -(1 << 15), 1 << 20]))
    return (low + np.floor(span * rng.random(size) ** skew)).astype(np.int64)


def entropy_bytes(numbers):
    counts = np.unique(numbers, return_counts=True)[1]
    return float(counts @ np.log2(counts.sum() / counts)) / 8


@given(arrays(), kinds)
def test_there_and_back_is_the_same(numbers, kind):
    coded = encode(numbers, kind)
    assert np.array_equal(decode(coded, most=len(numbers)), numbers)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int64])
@pytest.mark.parametrize("kind", KINDS)
def test_all_numbers_of_a_type_can_be_coded(dtype, kind):
    limits = np.iinfo(dtype)
    numbers = np.array([max(limits.min, -9), 0, min(limits.max, 9000)] * 3, dtype)
    assert np.array_equal(decode(encode(numbers, kind), most=9), numbers)


@given(seeds, st.integers(2, 64))
def test_ans_takes_what_the_entropy_says(seed, span):
    rng = np.random.default_rng(seed)
    numbers = rng.choice(span, 10_000, p=rng.dirichlet(np.ones(span)))
    # One part in a hundred, and the two words that every stream ends with.
    assert encode(numbers).data.nbytes <= 1.01 * entropy_bytes(numbers) + 8


@given(arrays())
def test_all_the_same_takes_no_data(numbers):
    for kind in KINDS:
        same = np.full_like(numbers, -7)
        assert encode(same, kind).data.size == 0
        assert np.array_equal(decode(encode(same, kind), most=len(same)), same)


counts_of_symbols = st.lists(st.one_of(st.just(0), st.integers(1, 50), st.integers(1, 10**6)), max_size=40)


@given(counts_of_symbols)
def test_huffman_lengths_are_the_best_and_fill_all_bits(counts):
    lengths = huffman_lengths(np.array(counts, np.int64)).astype(int)
    heap, total = [count for count in counts if count], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        total += pair
        heapq.heappush(heap, pair)
    assert [length > 0 for length in lengths] == [count > 0 for count in counts]
    if np.count_nonzero(counts) > 1:
        assert np.dot(counts, lengths) == total
        assert sum(Fraction(1, 2**length) for length in lengths.tolist() if length) == 1


def test_huffman_codes_longer_than_the_table_are_read():
    fibonacci = [1, 1]
    while len(fibonacci) < 20:
        fibonacci.append(sum(fibonacci[-2:]))
    numbers = np.random.default_rng(0).permutation(np.repeat(np.arange(20), fibonacci))
    coded = encode(numbers, "huffman")
    assert coded.table.max() == 19 > entropy._SHORT
    assert np.array_equal(decode(coded, most=len(numbers)), numbers)


def test_huffman_streams_of_several_parts_are_read():
    numbers = np.random.default_rng(0).integers(0, 200, 150_000) // 3
    coded = encode(numbers, "huffman")
    assert len(coded.data) > 3 * entropy._READ
    assert np.array_equal(decode(coded, most=len(numbers)), numbers)


@given(seeds, kinds, st.floats(0.01, 0.5))
def test_gaps_of_a_sparse_weight_are_coded(seed, kind, density):
    rng = np.random.default_rng(seed)
    weight = np.where(rng.random((50, 80)) < density, 1.0, 0.0)
    sparse = Sparse.from_dense(weight)
    gaps = decode(encode(sparse.gaps, kind), most=weight.size).astype(sparse.gaps.dtype)
    assert np.array_equal(Sparse(weight.shape, sparse.values, gaps).dense(), weight)


def test_lengths_beyond_what_is_believed_are_refused():
    for kind in KINDS:
        coded = encode(np.arange(10), kind)
        with pytest.raises(DataError, match="10 coded numbers where at most 9"):
            decode(coded, most=9)
        for length in (10**15, 1 << 70):
            with pytest.raises(DataError, match="where at most 10"):
                decode(replace(coded, length=length), most=10)


@given(seeds, kinds, st.integers(0, 400))
def test_damage_is_found_or_gives_as_many_numbers(seed, kind, length):
    rng = np.random.default_rng(seed)
    coded = encode(rng.integers(0, 20, 200), kind)
    data = rng.integers(0, 256, coded.data.nbytes, np.uint8).view(coded.data.dtype)
    table = rng.integers(0, 9, 20).astype(np.uint8)
    for lie in ({"data": data}, {"data": coded.data[: len(data) // 2]}, {"table": table}, {"length": length}):
        try:
            wrong = replace(coded, **lie)
            found = decode(wrong, most=400)
        except DataError:
            continue
        assert len(found) == wrong.length


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_additional_data_is_found(kind):
    coded = encode(np.random.default_rng(0).integers(0, 20, 500), kind)
    more = np.concatenate([coded.data, np.ones(5, coded.data.dtype)])
    for lie in ({"data": more}, {"length": 300}, {"length": 499 if kind == "ans" else 490}):
        with pytest.raises(DataError):
            decode(replace(coded, **lie), most=10**6)
    if kind == "huffman":
        with pytest.raises(DataError, match=r"ends after|cannot hold|bytes of data where"):
            decode(replace(coded, data=coded.data[:-9]), most=10**6)


def test_lengths_that_are_no_huffman_code_are_refused():
    coded = encode(np.array([0, 1, 2, 0]), "huffman")
    for lengths in ([1, 1, 1], [2, 2, 2], [3, 3, 1], [57, 57, 1], [255, 255, 255], [1] * 514):
        with pytest.raises(DataError, match="Huffman"):
            decode(replace(coded, table=np.array(lengths, np.uint8)), most=4)


def test_one_number_with_data_is_refused():
    coded = Coded(np.ones(3, np.uint8), np.array([1], np.uint8), 5, "huffman")
    with pytest.raises(DataError, match="where all numbers are the same"):
        decode(coded, most=5)


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"kind": "zip"}, "unknown kind"),
        ({"data": np.zeros(2, np.int64)}, "row of uint32"),
        ({"table": np.zeros(2)}, "as table"),
        ({"table": np.ones(70_000, np.uint8)}, "too large"),
        ({"low": 1 << 40}, "too large"),
        ({"length": -1}, "do not go with"),
        ({"length": 0}, "do not go with"),
        ({"table": np.zeros(3, np.uint8)}, "do not go with"),
    ],
)
def test_forms_that_describe_no_numbers_are_refused(lie, message):
    coded = encode(np.arange(5))
    with pytest.raises(DataError, match=message):
        replace(coded, **lie)


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(ValueError, match="within 65536"):
        encode(np.array([0, 1 << 16]))
    with pytest.raises(ValueError, match="within 65536"):
        encode(np.array([1 << 40]))
    with pytest.raises(TypeError, match="must be integers"):
        encode(np.array([0.5]))
    with pytest.raises(ValueError, match="choose one of ans, huffman"):
        encode(np.array([1]), "zip")


def test_without_the_coder_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"pysolve-compress\[coding\]"):
        encode(np.arange(3))
    assert np.array_equal(decode(encode(np.arange(3), "huffman"), most=3), np.arange(3))
