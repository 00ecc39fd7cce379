"""Quantised forms give back what their codes stand for, in as many bytes as they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from pysolve.errors import DataError
from pysolve.forms import Codebook, Integers, pack, unpack

shapes = st.lists(st.integers(0, 5), min_size=2, max_size=4).map(tuple)


@given(shapes, st.integers(1, 256), seeds)
def test_a_codebook_stands_for_the_values_of_its_codes(shape, k, seed):
    rng = np.random.default_rng(seed)
    centroids = rng.standard_normal(k).astype(np.float32)
    form = Codebook(rng.integers(0, k, shape).astype(np.uint8), centroids)
    dense = form.dense()
    assert dense.shape == form.shape == shape
    assert dense.dtype == np.float32
    assert all(dense[at] == centroids[form.codes[at]] for at in np.ndindex(shape))
    assert form.nbytes == len(pack(form.codes, form.bits)) + 4 * k
    assert 2**form.bits >= k


@given(shapes, st.integers(2, 8), st.integers(1, 9), st.booleans(), seeds)
def test_whole_numbers_stand_for_multiples_of_their_scale(shape, bits, group, affine, seed):
    rng, top = np.random.default_rng(seed), 1 << (bits - 1)
    columns = int(np.prod(shape[1:]))
    sides = (shape[0], -(-columns // group))
    codes = rng.integers(-top, top, shape).astype(np.int8)
    scales = rng.random(sides).astype(np.float32) + 0.1
    zeros = rng.integers(-top, top, sides).astype(np.int8)
    form = Integers(codes, scales, zeros if affine else None, bits, group)
    dense, flat = form.dense().reshape(shape[0], columns), codes.reshape(shape[0], columns).astype(int)
    for i, j in np.ndindex(dense.shape):
        zero = int(zeros[i, j // group]) if affine else 0
        assert dense[i, j] == float(flat[i, j] - zero) * float(scales[i, j // group])
    assert form.dense().shape == form.shape == shape
    assert form.nbytes == len(pack(codes, bits)) + scales.nbytes + affine * zeros.nbytes


@given(shapes, st.integers(1, 8), seeds)
def test_packed_codes_are_unpacked(shape, bits, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint8)
    data = pack(codes, bits)
    assert np.array_equal(unpack(data, bits, shape), codes)
    assert len(data) == -(-codes.size * bits // 8)
    with pytest.raises(DataError, match="do not hold"):
        unpack(np.append(data, np.uint8(0)), bits, shape)


def test_bytes_count_everything():
    codes = np.zeros((100, 100), np.uint8)
    assert Codebook(codes, np.zeros(16, np.float32)).nbytes == 4 * 10_000 / 8 + 16 * 4
    scales = np.ones((100, 1), np.float32)
    assert Integers(codes.astype(np.int8), scales, bits=3).nbytes == 3 * 10_000 / 8 + 100 * 4


@pytest.mark.parametrize(
    ("codes", "centroids", "message"),
    [
        (np.zeros((2, 2), np.int64), np.zeros(2), "uint8"),
        (np.zeros((2, 2), np.uint8), np.zeros((2, 1)), "row of 1 … 256"),
        (np.zeros((2, 2), np.uint8), np.zeros(0), "row of 1 … 256"),
        (np.zeros((2, 2), np.uint8), np.zeros(257), "row of 1 … 256"),
        (np.full((2, 2), 3, np.uint8), np.zeros(3), "code 3, but only 3"),
    ],
)
def test_codebooks_of_no_weight_are_refused(codes, centroids, message):
    with pytest.raises(DataError, match=message):
        Codebook(codes, centroids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codes": np.zeros((2, 3), np.uint8)}, "int8"),
        ({"codes": np.zeros(2, np.int8)}, "int8"),
        ({"scales": np.ones((2, 2))}, r"shape \(2, 1\)"),
        ({"group": 2}, r"shape \(2, 2\)"),
        ({"group": 0}, "group of inputs"),
        ({"bits": 9}, "2 … 8 bits"),
        ({"zeros": np.zeros((2, 2), np.int8)}, "shape"),
        ({"zeros": np.zeros((2, 1))}, "int8"),
        ({"codes": np.full((2, 3), 4, np.int8), "bits": 3}, "beyond"),
        ({"zeros": np.full((2, 1), -5, np.int8), "bits": 3}, "beyond"),
    ],
)
def test_whole_numbers_of_no_weight_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        Integers(**{"codes": np.zeros((2, 3), np.int8), "scales": np.ones((2, 1)), **options})
