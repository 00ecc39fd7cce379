"""Forms give back the weight that they were made from, in as few bytes as they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysolve.errors import DataError
from pysolve.forms import LowRank, Sparse


def weight(shape, density, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.standard_normal(shape), 0).astype(dtype)


shapes = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)


@given(shapes, st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.sampled_from([np.float32, np.float64]))
def test_there_and_back_is_the_same_weight(shape, density, dtype):
    given_weight = weight(shape, density, dtype=dtype)
    form = Sparse.from_dense(given_weight)
    assert np.array_equal(form.dense(), given_weight)
    assert form.dense().dtype == dtype
    assert form.nbytes == (given_weight.itemsize + 1) * np.count_nonzero(given_weight)


@pytest.mark.parametrize("gap", [253, 254, 255, 256, 509, 510, 511, 65534, 65535, 65536, 200_000])
def test_gaps_of_any_length_are_coded(gap):
    one = np.zeros((3, gap), np.float32)
    one[0, 0], one[1, 1], one[2, -1] = 1, 2, 3
    form = Sparse.from_dense(one)
    assert np.array_equal(form.dense(), one)
    assert np.array_equal(form.csr().toarray(), one)


def test_bytes_are_the_fewer_of_both_codes():
    assert Sparse.from_dense(weight((500, 800), 0.1)).gaps.dtype == np.uint8
    sparse = Sparse.from_dense(weight((2000, 2000), 0.0005))
    assert sparse.gaps.dtype == np.uint16
    assert sparse.nbytes == 6 * len(sparse.values)
    dense = Sparse.from_dense(weight((500, 800), 0.1))
    assert dense.nbytes == pytest.approx(5 * 40_000, rel=0.02)
    assert dense.density == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "values", "gaps", "message"),
    [
        ((2, 2), [1.0], np.array([1], np.int32), "uint8 or uint16"),
        ((2, 2), [1.0, 2.0], np.array([1], np.uint8), "for each of 2 values, got 1"),
        ((2, 2), [1.0], np.array([1, 255], np.uint8), "for each of 1 values"),
        ((2, 2), [1.0, 2.0], np.array([1, 2], np.uint8), "beyond the 4 places"),
        ((0, 2), [1.0], np.array([0], np.uint8), "beyond the 0 places"),
    ],
)
def test_forms_that_describe_no_weight_are_refused(shape, values, gaps, message):
    with pytest.raises(DataError, match=message):
        Sparse(shape, np.array(values), gaps)


def random_factors(h, r, c, outer=(), inner=(), dtype=np.float64):
    rng = np.random.default_rng(0)
    return LowRank(
        rng.standard_normal((h, r, *outer)).astype(dtype), rng.standard_normal((r, c, *inner)).astype(dtype)
    )


@st.composite
def factors(draw):
    sizes = [draw(st.integers(1, 4)) for _ in range(3)]
    kernel = draw(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=3))
    outer = tuple(size if out else 1 for size, out in kernel)
    inner = tuple(1 if out else size for size, out in kernel)
    return random_factors(*sizes, outer, inner, draw(st.sampled_from([np.float32, np.float64])))


@given(factors())
def test_factors_multiply_out_entry_by_entry(form):
    dense = form.dense()
    assert dense.shape == form.shape
    assert dense.dtype == form.outer.dtype
    kernels = [*zip(form.outer.shape[2:], form.inner.shape[2:], strict=True)]
    for h, c, *place in np.ndindex(form.shape):
        outer, inner = (
            tuple(at if size[which] > 1 else 0 for at, size in zip(place, kernels, strict=True))
            for which in (0, 1)
        )
        expected = sum(form.outer[(h, k, *outer)] * form.inner[(k, c, *inner)] for k in range(form.rank))
        assert dense[(h, c, *place)] == pytest.approx(expected, abs=1e-5)


@given(factors())
def test_factors_know_what_they_cost(form):
    assert form.nbytes == form.outer.nbytes + form.inner.nbytes
    assert form.density == pytest.approx((form.outer.size + form.inner.size) / form.dense().size)
    assert form.rank == form.outer.shape[1] == form.inner.shape[0]


@pytest.mark.parametrize(
    ("outer", "inner", "message"),
    [
        ((4, 2), (3, 5), r"shapes \(h, r, …\) and \(r, c, …\), got \(4, 2\) and \(3, 5\)"),
        ((4,), (4,), "expected factors of shapes"),
        ((4, 2), (2, 5, 1), "expected factors of shapes"),
        ((4, 2, 3, 1), (2, 5, 3, 1), "one factor must have size 1"),
        ((4, 0), (0, 5), "one factor must have size 1"),
        ((4, 2, 0), (2, 5, 3), "one factor must have size 1"),
    ],
)
def test_factors_that_describe_no_weight_are_refused(outer, inner, message):
    with pytest.raises(DataError, match=message):
        LowRank(np.ones(outer), np.ones(inner))
