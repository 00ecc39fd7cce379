"""Sparse products against SciPy, at every level of instructions and number of threads."""

import copy
import multiprocessing
import os
import pickle
import signal
import threading
from functools import cache

import numpy as np
import pytest
import scipy.sparse as sp
from compiled import running
from hypothesis import given
from hypothesis import strategies as st

import pysolve as ps
from pysolve import _core
from pysolve.layer.sparse_matrix import set_num_threads

LEVELS = _core.levels()
TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-13}


def random_csr(rows, columns, density, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((rows, columns)) < density, rng.standard_normal((rows, columns)), 0)
    return sp.csr_array(dense.astype(dtype))


def random_dense(*shape, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def bounds(csr, dense):
    """SciPy's product in double precision, and Σ |a| |x|, to which rounding is relative."""
    expected = csr.astype(float) @ dense.astype(float)
    return expected, abs(csr).astype(float) @ np.abs(dense.astype(float)) + 1e-300


def assert_within(result, csr, expected, scale):
    assert result.dtype == csr.dtype
    assert result.shape == expected.shape
    assert np.all(np.abs(result - expected) <= TOLERANCE[np.dtype(csr.dtype)] * scale)


def assert_close(result, csr, dense):
    """Within rounding of SciPy's product."""
    assert_within(result, csr, *bounds(csr, dense))


sizes = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 127, 129, 300]))


@st.composite
def products(draw):
    """A sparse matrix, a dense one, and how to multiply them."""
    rows, columns, batch = draw(sizes), draw(sizes), draw(sizes)
    density = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
    dtype, seed = draw(st.sampled_from([np.float32, np.float64])), draw(st.integers(0, 99))
    csr = random_csr(rows, columns, density, dtype, seed)
    return csr, random_dense(columns, batch, dtype=dtype, seed=seed + 1)


@given(products(), st.sampled_from(LEVELS), st.integers(1, 4))
def test_both_layouts_agree_with_scipy(product, level, threads):
    csr, dense = product
    matrix = ps.SparseMatrix.from_csr(csr)
    with running(level, threads):
        assert_close(matrix @ dense, csr, dense)
        assert_close(matrix.matmul(np.ascontiguousarray(dense.T)).T, csr, dense)
        assert_close(ps.csr_matmul(csr, dense), csr, dense)


@cache
def large(dtype, batch):
    """A sparse matrix, a dense one, and the bounds of their product."""
    csr = random_csr(500, 1700, 0.5 if batch == 1 else 0.1, dtype)
    csr.data *= 1 if batch > 1 else 1.5
    dense = random_dense(1700, batch, dtype=dtype)
    return csr, dense, *bounds(csr, dense)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch", [1, 2, 64, 200])
def test_large_products_are_shared_between_threads(level, threads, dtype, batch):
    csr, dense, expected, scale = large(dtype, batch)
    matrix = ps.SparseMatrix.from_csr(csr)
    with running(level, threads):
        assert_within(matrix @ dense, csr, expected, scale)
        assert_within(matrix.matmul(np.ascontiguousarray(dense.T)).T, csr, expected, scale)


@pytest.mark.parametrize("columns", [65536, 65537, 200_000])
@pytest.mark.parametrize("density", [2e-5, 1e-3])
def test_more_columns_than_16_bits_can_tell_apart(columns, density):
    rng = np.random.default_rng(0)
    csr = sp.random_array((30, columns), density=density, format="csr", dtype=np.float32, rng=rng)
    for batch in (1, 5):
        dense = random_dense(columns, batch)
        assert_close(ps.SparseMatrix.from_csr(csr) @ dense, csr, dense)
    assert (ps.SparseMatrix.from_csr(csr).to_csr() != csr).nnz == 0


def test_a_matrix_of_more_columns_than_int32_counts_is_refused():
    csr = sp.csr_array((1, 2**31), dtype=np.float32)
    with pytest.raises(ValueError, match="more than 2147483647 columns"):
        ps.SparseMatrix.from_csr(csr)


@pytest.mark.parametrize("block", [1, 16, 128, 1024, 4096])
@pytest.mark.parametrize("relu", [False, True])
def test_the_width_of_blocks_changes_nothing_but_rounding(block, relu):
    csr, dense, bias = random_csr(70, 1500, 0.2), random_dense(1500, 40), random_dense(70)
    core = _core.SparseFloat32(70, 1500, csr.indptr, csr.indices, csr.data, block=block)
    result = ps.SparseMatrix(core).matmul(dense, layout="feature", bias=bias, relu=relu)
    expected = csr @ dense + bias[:, None]
    np.testing.assert_allclose(result, np.maximum(expected, 0) if relu else expected, atol=1e-4)


@given(products(), st.booleans(), st.booleans(), st.sampled_from(LEVELS))
def test_bias_and_relu_come_with_the_product(product, with_bias, relu, level):
    csr, dense = product
    bias = random_dense(csr.shape[0], dtype=csr.dtype) if with_bias else None
    with running(level):
        result = ps.SparseMatrix.from_csr(csr).matmul(dense, "feature", bias=bias, relu=relu)
    expected = csr @ dense + (0 if bias is None else bias[:, None])
    np.testing.assert_allclose(result, np.maximum(expected, 0) if relu else expected, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 9])
def test_nan_and_infinity_reach_the_outputs_they_belong_to(level, batch):
    csr = sp.csr_array(np.array([[1, 0], [0, 1], [0, 0]], np.float32))
    dense = np.full((2, batch), np.nan, np.float32)
    dense[1] = np.inf
    with running(level):
        result = ps.SparseMatrix.from_csr(csr).matmul(dense, "feature", relu=True)
    assert np.isnan(result[0]).all()
    assert np.isinf(result[1]).all()
    assert (result[2] == 0).all()


@given(st.integers(0, 99), st.sampled_from([np.int32, np.int64]), st.sampled_from([np.float32, np.float64]))
def test_indices_may_be_unsorted_repeated_and_of_either_width(seed, index, dtype):
    rng = np.random.default_rng(seed)
    rows, columns, nnz = rng.integers(1, 12, 3)
    starts = np.sort(np.concatenate([[0, nnz], rng.integers(0, nnz + 1, rows - 1)])).astype(index)
    indices = rng.integers(0, columns, nnz).astype(index)
    csr = sp.csr_array((rows, columns), dtype=dtype)
    csr.indptr, csr.indices, csr.data = starts, indices, rng.integers(-9, 9, nnz).astype(dtype)
    before = csr.indices.copy(), csr.data.copy()
    matrix, dense = ps.SparseMatrix.from_csr(csr), rng.integers(-9, 9, (columns, 3)).astype(dtype)
    expected = np.zeros((rows, 3))
    for row in range(rows):
        for i in range(starts[row], starts[row + 1]):
            expected[row] += before[1][i] * dense[before[0][i]]
    assert np.array_equal(matrix @ dense, expected)
    assert np.array_equal(csr.indices, before[0])
    assert np.array_equal(csr.data, before[1])
    assert matrix.to_csr().has_canonical_format


def test_dense_matrices_may_lie_in_any_order():
    csr, dense = random_csr(20, 30, 0.3), random_dense(60, 22)
    matrix = ps.SparseMatrix.from_csr(csr)
    views = [
        dense[:30],
        dense[:30, ::2],
        dense[::2],
        dense[29::-1],
        np.asfortranarray(dense[:30]),
        dense[:30, :1],
        dense[::2, 3:4],
        np.broadcast_to(dense[:30, :1], (30, 7)),
    ]
    for view in views:
        assert_close(matrix @ view, csr, view)
        assert_close(matrix.matmul(view.T).T, csr, view)
    assert_close(matrix @ dense[:30, 0], csr, dense[:30, 0])
    assert_close(matrix.matmul(dense[:30, 0]), csr, dense[:30, 0])


@pytest.mark.parametrize("layout", ["feature", "batch"])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_results_go_where_they_are_wanted_and_nowhere_else(layout, batch):
    csr, dense = random_csr(21, 30, 0.3), random_dense(30, batch)
    matrix = ps.SparseMatrix.from_csr(csr)
    x = dense if layout == "feature" else np.ascontiguousarray(dense.T)
    shape = (21, batch) if layout == "feature" else (batch, 21)
    room = np.full((shape[0] + 2, shape[1] + 2), 7, np.float32)
    out = room[1:-1, 1:-1]
    assert matrix.matmul(x, layout, out=out) is out
    assert_close(out if layout == "feature" else out.T, csr, dense)
    room[1:-1, 1:-1] = 7
    assert (room == 7).all()


def test_a_result_cannot_overwrite_what_it_is_made_from():
    matrix, x = ps.SparseMatrix.from_csr(random_csr(8, 8, 0.5)), random_dense(8, 8)
    fixed = np.empty((8, 8), np.float32)
    fixed.flags.writeable = False
    for out in (x, x[::-1], fixed):
        with pytest.raises(ValueError, match="writeable and apart"):
            matrix.matmul(x, out=out)
    with pytest.raises(TypeError, match="out must be a float32 array, got float64"):
        matrix.matmul(x, out=np.empty((8, 8)))
    with pytest.raises(ValueError, match="out must be 8 x 8, got 8 x 9"):
        matrix.matmul(x, out=np.empty((8, 9), np.float32))
    with pytest.raises(ValueError, match="contiguous rows"):
        matrix.matmul(x, out=np.empty((8, 16), np.float32)[:, ::2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indptr": [1, 1, 2, 3]}, None),
        ({"indptr": [-1, 1, 2, 3]}, "begin at 0 or later, got -1"),
        ({"indptr": [0, 2, 1, 3]}, "decreases from 2 to 1 after row 1"),
        ({"indptr": [0, 1, 2, 4]}, "ends at 4 but there are only 3"),
        ({"indptr": [0, 1, 3]}, "rows \\+ 1 = 4 entries, got 3"),
        ({"indices": [0, 4, 2]}, "within 0 and 3, got 4 at position 1"),
        ({"indices": [0, -1, 2]}, "within 0 and 3, got -1 at position 1"),
        ({"indices": [0, 1]}, "equally long, got 2 and 3"),
        ({"data": [0.5, 1.0]}, "equally long, got 3 and 2"),
    ],
)
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_malformed_matrices_are_refused(change, message, index):
    csr = sp.csr_array((3, 4), dtype=np.float32)
    arrays = {"indptr": [0, 1, 2, 3], "indices": [0, 1, 2], "data": [1.0, 2.0, 3.0]} | change
    csr.indptr, csr.indices = np.array(arrays["indptr"], index), np.array(arrays["indices"], index)
    csr.data = np.array(arrays["data"], np.float32)
    if message is None:
        assert np.array_equal(ps.SparseMatrix.from_csr(csr).values, csr.data[1:])
    else:
        with pytest.raises(ValueError, match=message):
            ps.SparseMatrix.from_csr(csr)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.eye(3, dtype=np.float32), "expected a scipy.sparse CSR matrix, got ndarray"),
        (sp.csc_array(np.eye(3, dtype=np.float32)), "got a csc matrix: convert it with .tocsr"),
        (sp.csr_array(np.eye(3, dtype=int)), "expected float32 or float64 values, got int64"),
    ],
)
def test_other_matrices_are_refused_with_the_way_out(wrong, message):
    with pytest.raises(TypeError, match=message):
        ps.SparseMatrix.from_csr(wrong)


@pytest.mark.parametrize(
    ("dense", "kind", "message"),
    [
        (
            np.zeros((4, 2)),
            TypeError,
            "the dense matrix must be float32 as the sparse matrix is, got float64",
        ),
        (np.zeros((5, 2), np.float32), ValueError, "the dense matrix must be 4 x 2, got 5 x 2"),
        (np.zeros(5, np.float32), ValueError, "the dense matrix must be 1 x 4, got 1 x 5"),
        (np.zeros((4, 2, 1), np.float32), ValueError, "a vector or a matrix, got 3 dimensions"),
    ],
)
def test_dense_matrices_that_do_not_fit_are_refused(dense, kind, message):
    matrix = ps.SparseMatrix.from_csr(random_csr(3, 4, 0.5))
    with pytest.raises(kind, match=message):
        _ = matrix @ dense
    with pytest.raises(ValueError, match="bias must have 3 entries, got 4"):
        matrix.matmul(np.zeros((2, 4), np.float32), bias=np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"bias must have 3 entries, got shape \(3, 1\)"):
        matrix.matmul(np.zeros((2, 4), np.float32), bias=np.zeros((3, 1), np.float32))
    with pytest.raises(ValueError, match="unknown layout 'rows'"):
        matrix.matmul(np.zeros((2, 4), np.float32), "rows")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": [0.0] * 3}, "out must be a float32 array, got list"),
        ({"threads": 1.5}, "threads must be an integer of at least 1"),
        ({"threads": "all"}, "threads must be an integer of at least 1"),
        ({"relu": "yes"}, "relu must be True or False"),
    ],
)
def test_options_of_products_that_cannot_be_meant_are_refused(options, message):
    matrix = ps.SparseMatrix.from_csr(random_csr(3, 4, 0.5))
    with pytest.raises(TypeError, match=message):
        matrix.matmul(np.zeros(4, np.float32), **options)
    with pytest.raises(ValueError, match=r"threads must be an integer of at least 1, got -1"):
        matrix.value_gradient(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32), threads=-1)


@given(products(), st.sampled_from(LEVELS), st.integers(1, 3))
def test_the_gradient_by_the_values_is_that_of_the_product(product, level, threads):
    csr, x = product
    g = random_dense(csr.shape[0], x.shape[1], dtype=csr.dtype, seed=5)
    matrix = ps.SparseMatrix.from_csr(csr)
    rows, columns = matrix.to_csr().nonzero() if csr.nnz else (np.zeros(0, int), np.zeros(0, int))
    expected = np.sum(g[rows].astype(float) * x[columns], axis=1)
    with running(level, threads):
        np.testing.assert_allclose(matrix.value_gradient(g, x, "feature"), expected, atol=1e-3)
        np.testing.assert_allclose(matrix.value_gradient(g.T, x.T), expected, atol=1e-3)


@given(products())
def test_the_transposed_matrix_knows_where_its_entries_come_from(product):
    csr, _ = product
    matrix = ps.SparseMatrix.from_csr(csr)
    flipped, order = matrix.transposed()
    assert np.array_equal(flipped.to_csr().toarray(), csr.toarray().T)
    assert np.array_equal(flipped.values, matrix.values[order])


def test_values_can_be_changed_in_place():
    csr, x = random_csr(9, 12, 0.4), random_dense(12, 3)
    matrix = ps.SparseMatrix.from_csr(csr)
    matrix.values[:] *= 3
    assert_close(matrix @ x, 3 * csr, x)
    values = matrix.values
    del matrix
    assert np.array_equal(values, 3 * csr.data)


def test_bytes_are_those_of_values_indices_and_bounds():
    csr = random_csr(100, 50, 0.1)
    matrix = ps.SparseMatrix.from_csr(csr)
    assert matrix.nbytes == 6 * csr.nnz + 8 * 2 * 100 + 64
    assert (matrix.nnz, matrix.shape, matrix.dtype) == (csr.nnz, csr.shape, np.float32)
    assert repr(matrix) == f"SparseMatrix(100 x 50, float32, density {csr.nnz / 5000:.3g})"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@given(products())
def test_copies_and_pickles_are_the_same_matrix_apart_from_it(copied, product):
    csr, x = product[:2]
    matrix = ps.SparseMatrix.from_csr(csr)
    again = copied(matrix)
    assert (again.shape, again.dtype, again.nnz) == (matrix.shape, matrix.dtype, matrix.nnz)
    np.testing.assert_array_equal(again @ x, matrix @ x)
    again.values[:] = 0.0
    np.testing.assert_array_equal(matrix.values, ps.SparseMatrix.from_csr(csr).values)


@pytest.mark.parametrize("name", ["indptr", "indices"])
@pytest.mark.parametrize("kind", [np.float64, np.float32, bool, complex, object])
def test_index_arrays_that_are_no_integers_are_refused_with_the_way_out(name, kind):
    csr = random_csr(4, 5, 0.5)
    setattr(csr, name, getattr(csr, name).astype(kind))
    with pytest.raises(TypeError, match=rf"{name} must hold integers, got .*astype\(np.int64\)"):
        ps.SparseMatrix.from_csr(csr)
    with pytest.raises(TypeError, match=f"{name} must hold integers"):
        ps.csr_matmul(csr, np.ones((5, 2), np.float32))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint32, np.uint64, ">i4"])
def test_every_integer_indexes(kind):
    csr, x = random_csr(4, 5, 0.5), random_dense(5, 3)
    wanted = csr @ x
    csr.indptr, csr.indices = csr.indptr.astype(kind), csr.indices.astype(kind)
    np.testing.assert_allclose(ps.SparseMatrix.from_csr(csr) @ x, wanted, rtol=1e-6)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_the_number_of_threads_must_be_one_at_least(threads):
    with pytest.raises(ValueError if threads in (0, -1) else TypeError, match="an integer of at least 1"):
        set_num_threads(threads)


def in_child(queue):
    queue.put(heavy_product())


def heavy_product():
    csr, dense = random_csr(300, 700, 0.2), random_dense(700, 200)
    with running(threads=3):
        return float(np.abs(ps.SparseMatrix.from_csr(csr) @ dense - csr @ dense).max())


# From Python 3.12 on; that it is safe here is what is tested.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_threads_work_after_a_fork():
    assert heavy_product() < 1e-3
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=30) < 1e-3
    child.join(timeout=30)
    assert child.exitcode == 0


def test_products_from_many_threads_do_not_disturb_each_other():
    csr, dense = random_csr(300, 700, 0.2), random_dense(700, 100)
    matrix, wrong = ps.SparseMatrix.from_csr(csr), []
    expected = matrix @ dense

    def work():
        wrong.extend(not np.array_equal(matrix @ dense, expected) for _ in range(20))

    with running(threads=3):
        expected = matrix @ dense
        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == [False] * 80


def few_entries(rows, columns, count, seed=0, dtype=np.float32):
    """A huge matrix with a few entries."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.integers(0, rows, count))
    indptr = np.searchsorted(at, np.arange(rows + 1)).astype(np.int32)
    indices = rng.integers(0, columns, count).astype(np.int32)
    return sp.csr_array((rng.standard_normal(count).astype(dtype), indices, indptr), shape=(rows, columns))


def test_columns_without_entries_take_no_memory():
    csr = few_entries(20_000, 2**31 - 1, 1)
    matrix = ps.SparseMatrix.from_csr(csr)
    assert matrix.nbytes < 1e6
    back = matrix.to_csr()
    assert np.array_equal(back.indices, csr.indices)
    assert np.array_equal(back.indptr, csr.indptr)


def test_what_memory_has_no_room_for_is_refused_with_the_figure_before_it_is_taken():
    csr = few_entries(2_000_000, 2**31 - 1, 60_000)
    with pytest.raises(MemoryError, match=r"2000000 x 2147483647 with 60000 .* takes 4\d{5} MB .* are free"):
        ps.SparseMatrix.from_csr(csr)


@given(
    st.integers(1, 60),
    st.integers(70_000, 300_000),
    st.integers(0, 40),
    st.sampled_from([1, 2, 17]),
    st.integers(0, 99),
)
def test_products_skip_columns_without_entries(rows, columns, count, batch, seed):
    csr = few_entries(rows, columns, count, seed, np.float64)
    matrix, x = ps.SparseMatrix.from_csr(csr), np.random.default_rng(seed).standard_normal((batch, columns))
    for level in LEVELS:
        with running(level):
            np.testing.assert_allclose(matrix.matmul(x), (csr @ x.T).T, rtol=1e-12, atol=1e-12)
            found = matrix.matmul(np.ascontiguousarray(x.T), "feature")
            np.testing.assert_allclose(found, csr @ x.T, rtol=1e-12, atol=1e-12)


def layouts(matrix):
    """The same numbers in other memory orders, with any stride where a dimension is one."""
    h, d = matrix.shape
    wide = np.zeros((2 * h, 3 * d), matrix.dtype)
    wide[::2, ::3] = matrix
    crooked = np.zeros(matrix.nbytes + 1, np.uint8)[1:].view(matrix.dtype).reshape(matrix.shape)
    crooked[...] = matrix
    locked = matrix.copy()
    locked.flags.writeable = False
    yield from (matrix, np.asfortranarray(matrix), wide[::2, ::3], np.flip(np.flip(matrix).copy()))
    yield from (crooked, locked)
    odd = (-40 if h == 1 else matrix.strides[0], 3 if d == 1 else matrix.strides[1])
    yield np.lib.stride_tricks.as_strided(matrix, matrix.shape, odd)


@pytest.mark.parametrize("layout", ["feature", "batch"])
@given(
    shape=st.sampled_from([(15, 1), (1, 15), (7, 20), (0, 5), (5, 0), (300, 15), (1, 1)]),
    batch=st.sampled_from([0, 1, 2, 16, 257]),
    repeated=st.sampled_from([(), (0,), (1,), (0, 1)]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_arrays_of_every_layout_are_multiplied(layout, shape, batch, repeated, dtype):
    csr = random_csr(*shape, 0.4, dtype)
    matrix, (h, d) = ps.SparseMatrix.from_csr(csr), shape
    feature = layout == "feature"
    x, g = (random_dense(*((n, batch) if feature else (batch, n)), dtype=dtype) for n in (d, h))
    for axis in repeated:
        if x.shape[axis]:
            x = np.broadcast_to(x.take([0], axis), x.shape)
    wanted = csr @ x if feature else (csr @ x.T).T
    slope = g @ x.T if feature else g.T @ x
    entries = csr.tocoo()
    for own in (x, *layouts(x.copy())):
        np.testing.assert_allclose(matrix.matmul(own, layout), wanted, rtol=1e-4, atol=1e-4)
        for other in layouts(g):
            found = matrix.value_gradient(other, own, layout)
            np.testing.assert_allclose(found, slope[entries.row, entries.col], rtol=1e-3, atol=1e-3)


def test_an_array_larger_than_what_is_copied_at_once_is_the_same(monkeypatch):
    csr, x = random_csr(20, 30, 0.4), random_dense(57, 30)
    wanted = ps.SparseMatrix.from_csr(csr).matmul(np.ascontiguousarray(x.T), "feature")
    monkeypatch.setattr("pysolve.layer.sparse_matrix._LONGEST", 100)
    np.testing.assert_array_equal(ps.SparseMatrix.from_csr(csr).matmul(x.T, "feature"), wanted)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("threads", [1, 2])
def test_control_c_ends_a_product(threads):
    matrix, x = ps.SparseMatrix.from_csr(random_csr(64, 8192, 0.5)), random_dense(4, 8192)
    # No memory for the samples: all rows are the same ones.
    x = np.lib.stride_tricks.as_strided(x, (200_000, 8192), (0, 4))
    out = np.full((200_000, 64), np.nan, np.float32)
    killer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        matrix.matmul(x, out=out, threads=threads)
    assert np.isnan(out).any(), "the product was finished first"
