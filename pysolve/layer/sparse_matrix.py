"""Sparse matrix × dense matrix: a matrix is prepared once and multiplied many times."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, csr_matrix, issparse

from pysolve import _core

Dense = npt.NDArray[Any]
Layout = Literal["feature", "batch"]

_Core = _core.SparseFloat32 | _core.SparseFloat64
_CORES: dict[np.dtype[Any], Any] = {
    np.dtype(np.float32): _core.SparseFloat32,
    np.dtype(np.float64): _core.SparseFloat64,
}


class SparseMatrix:
    """A sparse h × d matrix, laid out for fast products with dense ones. Make one with ``from_csr``.

    Its columns are cut into blocks that suit the processor's caches, and 16-bit numbers tell the columns of a
    block apart; the kernels use AVX-512, AVX2 or plain instructions, whatever the processor has.

    Attributes
    ----------
    shape : (int, int)
    dtype : float32 or float64
    nnz : int
        Stored entries.
    nbytes : int
        Bytes of values, indices and row bounds in memory.
    values : (nnz,) array
        The entries row by row, in each row by columns. What is written there counts.
    """

    def __init__(self, core: _Core) -> None:
        self._core: Any = core
        self.shape: tuple[int, int] = (core.rows, core.columns)
        self.values: Dense = core.values

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
        core = _CORES[csr.dtype](*csr.shape, csr.indptr, csr.indices, np.ascontiguousarray(csr.data))
        return cls(core)

    @property
    def dtype(self) -> np.dtype[Any]:
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
        x: Any,
        layout: Layout = "batch",
        *,
        bias: Any = None,
        relu: bool = False,
        out: Dense | None = None,
    ) -> Dense:
        """Product with b samples, with bias and ReLU in the same pass.

        ``layout="batch"``:  Y = X Aᵀ + bias,  X b × d, Y b × h, as a linear layer computes it.
        ``layout="feature"``:  Y = A X + bias,  X d × b, Y h × b.

        Parameters
        ----------
        x : (b, d) or (d, b) array, or (d,) array
            Of the matrix's type.
        layout : "batch" or "feature"
        bias : (h,) array, optional
        relu : bool
            Replace negative numbers by 0.
        out : array, optional
            Where to put the result; of the right shape and type, with contiguous rows, apart from x.

        Returns
        -------
        (b, h) or (h, b) array, or (h,) array
        """
        batch_major = _is_batch(layout)
        x = self._checked("the dense matrix", x)
        if x.ndim == 1:
            rows = None if out is None else out[None]
            vector: Dense = self.matmul(x[None], bias=bias, relu=relu, out=rows)[0]
            return vector
        if x.ndim != 2:
            raise ValueError(f"expected a vector or a matrix, got {x.ndim} dimensions.")
        if x.strides[1] != x.itemsize or x.strides[0] < 0:
            x = np.ascontiguousarray(x)
        if out is None:
            b = x.shape[0 if batch_major else 1]
            out = np.empty((b, self.shape[0]) if batch_major else (self.shape[0], b), self.dtype)
        elif not isinstance(out, np.ndarray) or out.dtype != self.dtype:
            raise TypeError(
                f"out must be a {self.dtype} array, got {getattr(out, 'dtype', type(out).__name__)}."
            )
        elif not out.flags.writeable or np.may_share_memory(x, out):
            raise ValueError("out must be writeable and apart from the dense matrix.")
        if bias is not None:
            bias = np.ascontiguousarray(self._checked("bias", bias))
        self._core.multiply(x, batch_major, out, bias, relu, _core.num_threads())
        return out

    def __matmul__(self, dense: Any) -> Dense:
        """A X for a d × b matrix X, or A x for a vector of d entries."""
        return self.matmul(dense, layout="feature")

    def value_gradient(self, gradient: Any, x: Any, layout: Layout = "batch") -> Dense:
        """Σ_samples gradient_r x_c for each entry (r, c): gradient of a loss by ``values``.

        Parameters
        ----------
        gradient : (b, h) or (h, b) array
            Of the loss by the product that ``matmul(x, layout)`` gives.
        x : (b, d) or (d, b) array
        layout : "batch" or "feature"

        Returns
        -------
        (nnz,) array
        """
        g, x = (np.ascontiguousarray(self._checked("the array", array)) for array in (gradient, x))
        result: Dense = self._core.value_gradient(g, x, _is_batch(layout), _core.num_threads())
        return result

    def transposed(self) -> tuple[SparseMatrix, npt.NDArray[np.int64]]:
        """The transposed matrix, and at which of this one's entries each of its own stands."""
        order = csr_array((np.arange(self.nnz), self._core.indices(), self._core.indptr()), shape=self.shape)
        flipped = order.T.tocsr()
        core = _CORES[self.dtype](*flipped.shape, flipped.indptr, flipped.indices, self.values[flipped.data])
        order_of_entries: npt.NDArray[np.int64] = flipped.data
        return SparseMatrix(core), order_of_entries

    def _checked(self, name: str, values: Any) -> Dense:
        array: Dense = np.asarray(values)
        if array.dtype != self.dtype:
            raise TypeError(f"{name} must be {self.dtype} as the sparse matrix is, got {array.dtype}.")
        return array

    def __repr__(self) -> str:
        density = self.nnz / max(1, self.shape[0] * self.shape[1])
        return f"SparseMatrix({self.shape[0]} x {self.shape[1]}, {self.dtype}, density {density:.3g})"


def _is_batch(layout: str) -> bool:
    if layout not in ("feature", "batch"):
        raise ValueError(f"layout must be 'feature' or 'batch', got {layout!r}.")
    return layout == "batch"


def csr_matmul(csr: csr_array | csr_matrix, dense: Any, out: Dense | None = None) -> Dense:
    """A X for a SciPy CSR matrix A (h × d) and a dense X (d × b), float32 or float64.

    Prepares A anew: for many products with one matrix keep a ``SparseMatrix``.

    Parameters
    ----------
    csr : (h, d) scipy.sparse CSR matrix or array
    dense : (d, b) or (d,) array
        Of the same type.
    out : (h, b) or (h,) array, optional

    Returns
    -------
    (h, b) or (h,) array
    """
    return SparseMatrix.from_csr(csr).matmul(dense, layout="feature", out=out)


def set_num_threads(threads: int) -> None:
    """How many threads a sparse product may use, the caller's own included; small products use fewer."""
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer) or threads < 1:
        raise ValueError(f"threads must be a whole number of at least 1, got {threads!r}.")
    _core.set_num_threads(int(threads))


def get_num_threads() -> int:
    """How many threads a sparse product may use; at first as many as the process has processors."""
    return int(_core.num_threads())
