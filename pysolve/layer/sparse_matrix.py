"""Sparse matrix × dense matrix: a matrix is prepared once and multiplied many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, csr_matrix, issparse

from pysolve import _core
from pysolve.correlations import AnyArray, as_numpy
from pysolve.errors import check_flags, one_of, whole

Layout = Literal["feature", "batch"]

# That of either type.
_Core: TypeAlias = "_core._Sparse[Any]"
_CORES: dict[np.dtype[np.generic], Callable[..., _Core]] = {
    np.dtype(np.float32): _core.SparseFloat32,
    np.dtype(np.float64): _core.SparseFloat64,
}


# Numbers that are copied at once, for at most some 50 ms: an interrupt must not wait for more.
_LONGEST = 1 << 21
# More than any machine has.
_MOST_THREADS = 1 << 16


class SparseMatrix:
    """A sparse h × d matrix, stored for fast products with dense ones. Make one with ``from_csr``.

    Its columns are split into blocks that suit the processor's caches, with 16-bit indices in each; the
    kernels use AVX-512, AVX2 or plain instructions, whatever the processor has.

    Attributes
    ----------
    shape : (int, int)
    dtype : float32 or float64
    nnz : int
        Stored entries.
    nbytes : int
        Bytes of values, indices and row bounds in memory.
    values : (nnz,) array
        The entries row by row, in each row by columns. May be written to.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> import scipy.sparse as sp
    >>> csr = sp.random_array((64, 128), density=0.125, format="csr", dtype=np.float32)
    >>> matrix = ps.SparseMatrix.from_csr(csr)
    >>> matrix.nnz, (matrix @ np.ones((128, 8), np.float32)).shape
    (1024, (64, 8))
    """

    def __init__(self, core: _Core) -> None:
        self._core = core
        self.shape: tuple[int, int] = (core.rows, core.columns)
        self.values: AnyArray = core.values

    @classmethod
    def from_csr(cls, csr: csr_array | csr_matrix) -> SparseMatrix:
        """Prepare a SciPy CSR matrix of float32 or float64.

        Indices may be unsorted; entries at the same place add up. The matrix is copied.

        Raises
        ------
        TypeError
            For anything but a CSR matrix of these types.
        ValueError
            When its index arrays do not describe a matrix.
        """
        if not issparse(csr) or csr.format != "csr" or csr.ndim != 2:
            kind = f"a {csr.format} matrix" if issparse(csr) else type(csr).__name__
            raise TypeError(f"expected a scipy.sparse CSR matrix, got {kind}: convert it with .tocsr().")
        if csr.dtype not in _CORES:
            raise TypeError(f"expected float32 or float64 values, got {csr.dtype}: convert with .astype(…).")
        index = {"indptr": csr.indptr, "indices": csr.indices}
        for name, array in index.items():
            if array.dtype.kind not in "iu":
                raise TypeError(
                    f"{name} must hold integers, got {array.dtype}: convert with .astype(np.int64)."
                )
            if array.dtype not in (np.int32, np.int64):
                index[name] = array.astype(np.int64)
        return cls(_CORES[csr.dtype](*csr.shape, *index.values(), np.ascontiguousarray(csr.data)))

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles are prepared anew from the matrix for SciPy."""
        return type(self).from_csr, (self.to_csr(),)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return self.values.dtype

    @property
    def nnz(self) -> int:
        return self.values.size

    @property
    def nbytes(self) -> int:
        return int(self._core.nbytes)

    def to_csr(self) -> csr_array:
        """The same matrix for SciPy; a copy."""
        return csr_array((self.values.copy(), self._core.indices(), self._core.indptr()), shape=self.shape)

    def matmul(
        self,
        x: npt.ArrayLike,
        layout: Layout = "batch",
        *,
        bias: npt.ArrayLike | None = None,
        relu: bool = False,
        out: AnyArray | None = None,
        threads: int | None = None,
    ) -> AnyArray:
        """Product with b samples, with bias and ReLU in the same pass.

        ``layout="batch"``:  Y = X Aᵀ + bias,  X b × d, Y b × h, as a linear layer computes it.
        ``layout="feature"``:  Y = A X + bias,  X d × b, Y h × b.

        Parameters
        ----------
        x : (b, d) or (d, b) array, or (d,) array
            In the matrix's data type.
        layout : "batch" or "feature"
        bias : (h,) array, optional
        relu : bool
            Replace negative numbers by 0.
        out : array, optional
            Array for the result; of its shape and type, with contiguous rows, apart from x.
        threads : int, optional
            At most; by default as ``set_num_threads`` has it.

        Returns
        -------
        (b, h) or (h, b) array, or (h,) array

        Raises
        ------
        TypeError, ValueError
            For an array of another data type or shape, or an unknown layout.
        """
        batch_major, threads = _is_batch(layout), _checked_threads(threads)
        check_flags(relu=relu)
        dense = self._checked("the dense matrix", x)
        if out is not None and (not isinstance(out, np.ndarray) or out.dtype != self.dtype):
            raise TypeError(
                f"out must be a {self.dtype} array, got {getattr(out, 'dtype', type(out).__name__)}."
            )
        if dense.ndim == 1:
            rows = None if out is None else out[None]
            return np.asarray(self.matmul(dense[None], bias=bias, relu=relu, out=rows, threads=threads)[0])
        if dense.ndim != 2:
            raise ValueError(f"expected a vector or a matrix, got {dense.ndim} dimensions.")
        dense = _in_rows(dense)
        if out is None:
            b = dense.shape[0 if batch_major else 1]
            out = np.empty((b, self.shape[0]) if batch_major else (self.shape[0], b), self.dtype)
        elif not out.flags.writeable or np.may_share_memory(dense, out):
            raise ValueError("out must be writeable and apart from the dense matrix.")
        if bias is not None:
            bias = np.ascontiguousarray(self._checked("bias", bias))
            if bias.ndim != 1:
                raise ValueError(f"bias must have {self.shape[0]} entries, got shape {bias.shape}.")
        self._core.multiply(dense, batch_major, out, bias, bool(relu), threads)
        return out

    def __matmul__(self, dense: npt.ArrayLike) -> AnyArray:
        """A X for a d × b matrix X, or A x for a vector of d entries."""
        return self.matmul(dense, layout="feature")

    def value_gradient(
        self,
        gradient: npt.ArrayLike,
        x: npt.ArrayLike,
        layout: Layout = "batch",
        *,
        threads: int | None = None,
    ) -> AnyArray:
        """Σ_samples gradient_r x_c for each entry (r, c): gradient of a loss by ``values``.

        Parameters
        ----------
        gradient : (b, h) or (h, b) array
            Gradient of the loss by the product that ``matmul(x, layout)`` gives.
        x : (b, d) or (d, b) array
        layout : "batch" or "feature"
        threads : int, optional

        Returns
        -------
        (nnz,) array
        """
        g, dense = (_in_rows(self._checked("the array", array)) for array in (gradient, x))
        found = self._core.value_gradient(g, dense, _is_batch(layout), _checked_threads(threads))
        return np.asarray(found)

    def transposed(self) -> tuple[SparseMatrix, npt.NDArray[np.int64]]:
        """The transposed matrix, and for each of its entries the index of the entry here."""
        order = csr_array((np.arange(self.nnz), self._core.indices(), self._core.indptr()), shape=self.shape)
        flipped = order.T.tocsr()
        core = _CORES[self.dtype](*flipped.shape, flipped.indptr, flipped.indices, self.values[flipped.data])
        order_of_entries: npt.NDArray[np.int64] = flipped.data
        return SparseMatrix(core), order_of_entries

    def _checked(self, name: str, values: npt.ArrayLike) -> AnyArray:
        array = as_numpy(name, values)
        if array.dtype != self.dtype:
            raise TypeError(f"{name} must be {self.dtype} as the sparse matrix is, got {array.dtype}.")
        return array

    def __repr__(self) -> str:
        density = self.nnz / max(1, self.shape[0] * self.shape[1])
        return f"SparseMatrix({self.shape[0]} x {self.shape[1]}, {self.dtype}, density {density:.3g})"


def _in_rows(dense: AnyArray) -> AnyArray:
    """The matrix, or a copy whose rows are contiguous, in memory as the processor reads it."""
    if dense.ndim == 2 and dense.strides[1] == dense.itemsize and dense.strides[0] >= 0:
        return np.require(dense, requirements="A")
    if dense.size <= _LONGEST or dense.ndim != 2:
        return np.require(dense, requirements=("C", "A"))
    rows, copy = max(_LONGEST // dense.shape[1], 1), np.empty(dense.shape, dense.dtype)
    for first in range(0, len(copy), rows):
        copy[first : first + rows] = dense[first : first + rows]
    return copy


def _checked_threads(threads: int | None) -> int:
    return get_num_threads() if threads is None else min(whole("threads", threads), _MOST_THREADS)


def _is_batch(layout: str) -> bool:
    return one_of("layout", layout, ("feature", "batch")) == "batch"


def csr_matmul(csr: csr_array | csr_matrix, dense: npt.ArrayLike, out: AnyArray | None = None) -> AnyArray:
    """A X for a SciPy CSR matrix A (h × d) and a dense X (d × b), float32 or float64.

    Prepares A anew: for many products with one matrix keep a ``SparseMatrix``.

    Parameters
    ----------
    csr : (h, d) scipy.sparse CSR matrix or array
    dense : (d, b) or (d,) array
        In the same data type.
    out : (h, b) or (h,) array, optional

    Returns
    -------
    (h, b) or (h,) array

    Raises
    ------
    TypeError, ValueError
        For anything but a CSR matrix and an array that fits it.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> import scipy.sparse as sp
    >>> csr = sp.random_array((64, 128), density=0.1, format="csr", dtype=np.float32)
    >>> ps.csr_matmul(csr, np.ones((128, 8), np.float32)).shape
    (64, 8)
    """
    return SparseMatrix.from_csr(csr).matmul(dense, layout="feature", out=out)


def set_num_threads(threads: int) -> None:
    """Set the number of threads that a sparse product may use, the caller's own included.

    Small products use fewer. Sparse layers of networks use as many as torch does.

    Raises
    ------
    ValueError, TypeError
        For anything but an integer of at least 1.

    Examples
    --------
    >>> import pysolve as ps
    >>> before = ps.get_num_threads()
    >>> ps.set_num_threads(2)
    >>> ps.get_num_threads()
    2
    >>> ps.set_num_threads(before)
    """
    _core.set_num_threads(min(whole("threads", threads), _MOST_THREADS))


def get_num_threads() -> int:
    """The number of threads that a sparse product may use; at first that of the process's processors.

    Examples
    --------
    >>> import pysolve as ps
    >>> ps.get_num_threads() >= 1
    True
    """
    return int(_core.num_threads())
