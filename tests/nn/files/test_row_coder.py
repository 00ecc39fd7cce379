"""Rows of numbers come back exactly, in no more bytes than they need, and are read with distrust."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from pysolve.errors import DataError
from pysolve.forms import Sparse
from pysolve.nn.files import row_coder as module
from pysolve.nn.files.row_coder import Part, Stream, distinct, fitted, gapped, gapped_of, row_of, written

kinds = st.sampled_from(["ans", "huffman"])
dtypes = st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64])


@st.composite
def rows(draw, most=3000):
    """Of few values and many, with and without zeros, floats with and without their last bits, any bits."""
    rng = np.random.default_rng(draw(seeds))
    dtype = np.dtype(draw(dtypes))
    size = draw(st.sampled_from([0, 1, 2, 3, 40, most]))
    if draw(st.booleans()):
        row = rng.integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)
    else:
        row = rng.standard_normal(size).astype(f"f{max(2, dtype.itemsize)}").view(np.uint8)
        row = row.view(dtype)[:size].copy()
    if dtype.itemsize > 1 and draw(st.booleans()):
        row &= dtype.type(np.iinfo(dtype).max - ((1 << (4 * dtype.itemsize)) - 1))
    few = draw(st.sampled_from([0, 1, 2, 16, 300]))
    if few and size:
        row = rng.choice(row[:few], size)
    row[rng.random(size) < draw(st.sampled_from([0.0, 0.1, 0.9, 0.99, 1.0]))] = 0
    return row


def stream_of(part):
    out = []
    told = written(part, out)
    return json.loads(json.dumps(told)), np.concatenate([np.zeros(0, np.uint8), *out])


def there_and_back(row, kind, part=None):
    """The row through its bytes; how many they are, and how it is described."""
    told, data = stream_of(part or fitted(row, kind))
    # Other bytes before it: rows begin anywhere.
    stream = Stream(np.concatenate([np.zeros(3, np.uint8), data]), 3)
    again = row_of(told, stream, len(row), row.dtype)
    assert again.dtype == row.dtype
    assert np.array_equal(again, row)
    assert stream.at == 3 + len(data)
    return len(data), told


@given(rows(), kinds)
def test_rows_come_back_exactly_and_never_take_more_than_raw(row, kind):
    size, _ = there_and_back(row, kind)
    assert size <= row.nbytes


@given(rows(), kinds, st.sampled_from(["", "t", "p", "g", "tp", "pg", "tg"]))
def test_every_way_comes_back_whatever_the_others_take(row, kind, ways):
    if row.size and row.min() < row.max():
        for part in module._ways(row, kind, ways):
            size, _ = there_and_back(row, kind, part)
            # Estimates decide: they must be close.
            assert abs(part.size - size) <= 0.05 * size + 16 * json.dumps(part_shape(part)).count("[") + 8


def part_shape(part):
    return [part_shape(one) for one in part.parts]


@given(rows(), kinds)
def test_long_rows_are_found_out_by_samples(row, kind):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SAMPLE", 64)
        patch.setattr(module, "_CHUNK", 100)
        patch.setattr(module, "_HASHED", 20)
        patch.setattr(module, "_LONG", 256)
        size, _ = there_and_back(row, kind)
    assert size <= row.nbytes


@given(rows(), st.sampled_from([20, 384]))
def test_distinct_entries_and_their_codes_make_the_row(row, hashed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SAMPLE", 64)
        patch.setattr(module, "_CHUNK", 100)
        patch.setattr(module, "_HASHED", hashed)
        found = distinct(row) if row.size else None
    if found is not None:
        table, codes = found
        assert np.array_equal(table, np.unique(row))
        assert np.array_equal(table[codes], row)
        assert codes.dtype == (np.uint8 if len(table) <= 256 else np.uint16)


def entropy_bytes(row):
    counts = np.unique(row, return_counts=True)[1]
    return float(counts @ np.log2(counts.sum() / counts)) / 8


@given(seeds, st.integers(2, 60), st.floats(0, 0.95), dtypes)
def test_few_values_take_their_entropy_and_a_table(seed, count, zeros, dtype):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, np.iinfo(dtype).max, count, dtype)
    row = np.where(rng.random(20_000) < zeros, 0, rng.choice(table, 20_000)).astype(dtype)
    size, _ = there_and_back(row, "ans")
    assert size <= 1.01 * entropy_bytes(row) + (count + 1) * (row.itemsize + 2) + 16


@pytest.mark.parametrize("kind", ["ans", "huffman"])
def test_rare_entries_take_their_bytes_and_few_bits_for_the_zeros_between(kind):
    rng = np.random.default_rng(0)
    row = np.where(rng.random(30_000) < 0.05, rng.integers(1, 2**32, 30_000, np.uint32), 0).astype(np.uint32)
    size, told = there_and_back(row, kind)
    entropy = entropy_bytes(row > 0)
    assert told[0] == "g"
    assert size <= 4 * np.count_nonzero(row) + 1.05 * entropy + 300


@pytest.mark.parametrize("kind", ["ans", "huffman"])
def test_what_has_no_low_bits_takes_two_bytes_or_less(kind):
    values = np.random.default_rng(0).standard_normal(100).astype(np.float32).view(np.uint32)
    size, told = there_and_back(values & np.uint32(0xFFFF0000), kind)
    assert told[:3] == ["p", 0, 0]
    assert size <= 2 * 100


@pytest.mark.parametrize(("dtype", "share"), [(np.float16, 0.9), (np.float32, 0.86), (np.float64, 0.9)])
def test_numbers_of_a_normal_distribution_take_less(dtype, share):
    values = np.random.default_rng(0).standard_normal(20_000).astype(dtype)
    size, _ = there_and_back(values.view(f"u{values.itemsize}"), "ans")
    assert size <= share * values.nbytes


def test_noise_is_left_as_it_is():
    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.uint32):
        row = rng.integers(0, np.iinfo(dtype).max, 5000, dtype, endpoint=True)
        assert there_and_back(row, "ans") == (row.nbytes, "r")


@pytest.mark.parametrize("value", [0, 1, 2**64 - 1])
def test_one_value_takes_no_bytes(value):
    assert there_and_back(np.full(1000, value, np.uint64), "ans") == (0, value)


@given(seeds, kinds, st.floats(0, 1))
def test_entries_at_given_places_come_back_also_those_that_are_zero(seed, kind, density):
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(rng.random(200) < density)
    form = Sparse.at(places, rng.integers(0, 3, len(places)).astype(np.uint32), (10, 20))
    told, data = stream_of(gapped(form, kind))
    again = gapped_of(told, Stream(data), (10, 20), np.uint32)
    assert np.array_equal(again.places(), places)
    assert np.array_equal(again.values, form.values)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.sampled_from([*"rahtpg", 1 << 40, 65535, 0.5]),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=8,
)


@st.composite
def lies(draw, told):
    """A description with some part of it replaced."""
    if not isinstance(told, list) or not draw(st.integers(0, 4)):
        return draw(JSON)
    i = draw(st.integers(0, len(told) - 1))
    return [*told[:i], draw(lies(told[i])), *told[i + 1 :]]


@given(rows(300), kinds, st.data())
def test_any_description_of_any_bytes_is_refused_or_gives_a_row(row, kind, data):
    told, content = stream_of(fitted(row, kind))
    if content.size and data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    else:
        told = data.draw(lies(told))
    try:
        again = row_of(told, Stream(content), len(row), row.dtype)
    except DataError:
        return
    assert again.shape == row.shape
    assert again.dtype == row.dtype


def test_without_the_coder_what_it_wrote_is_not_read_and_the_message_says_what_to_install(monkeypatch):
    row = np.arange(1000, dtype=np.uint8) // 100
    told, data = stream_of(fitted(row, "ans"))
    other = stream_of(fitted(row, "huffman"))
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"pysolve-compress\[coding\]"):
        row_of(told, Stream(data), 1000, np.uint8)
    assert np.array_equal(row_of(other[0], Stream(other[1]), 1000, np.uint8), row)


@pytest.mark.parametrize("kind", ["ans", "huffman"])
def test_bytes_of_long_rows_are_deflated_those_that_are_noise_left_as_they_are(kind):
    values = np.random.default_rng(0).standard_normal(module._LONG + 1).astype(np.float32)
    size, told = there_and_back(values.view(np.uint32), kind)
    assert told[:4] == ["p", "r", "r", "r"]
    assert told[4][0] == "z"
    assert size <= 0.86 * values.nbytes


@pytest.mark.parametrize("size", [998, 1002])
def test_deflated_bytes_must_be_as_many_as_the_row_has(size):
    row = np.zeros(1000, np.uint8)
    told, data = stream_of(Part(0, "z", row))
    assert np.array_equal(row_of(told, Stream(data), 1000, np.uint8), row)
    with pytest.raises(DataError, match=r"more than the 998|expected 1002 bytes, got 1000"):
        row_of(told, Stream(data), size, np.uint8)
    for damaged in (data[:-1], np.concatenate([data, data[:1]])):
        with pytest.raises(DataError, match="end too early, or too late"):
            row_of(["z", len(damaged)], Stream(damaged), 1000, np.uint8)
