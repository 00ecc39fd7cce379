"""Eigenvalues of symmetric matrices, for which a Ctrl-C does not have to wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

import numpy as np
import scipy.linalg

from pysolve.correlations import Array

T = TypeVar("T")

# Of smaller matrices they take less than a tenth of a second.
_LARGE = 500


def eigh(A: Array, B: Array | None = None) -> tuple[Array, Array]:
    """Eigenvalues w, rising, and eigenvectors V with  A V = V diag(w),  or  A V = B V diag(w), Vᵀ B V = 1.

    Parameters
    ----------
    A, B : (d, d) array
        Symmetric, B positive definite.

    Returns
    -------
    (d,) array, (d, d) array

    Raises
    ------
    numpy.linalg.LinAlgError
        If B is not definite, or the iterations end without a result.
    """
    if B is None:
        # SciPy's holds the lock of the interpreter meanwhile, NumPy's does not.
        return (np.linalg.eigh if len(A) < _LARGE else answering(np.linalg.eigh))(A)
    L = np.linalg.cholesky(B)
    half = scipy.linalg.solve_triangular(L, A, lower=True, check_finite=False)
    inner = scipy.linalg.solve_triangular(L, half.T, lower=True, check_finite=False)
    values, vectors = eigh((inner + inner.T) / 2)
    return values, scipy.linalg.solve_triangular(L, vectors, lower=True, trans=1, check_finite=False)


def answering(function: Callable[[Array], T]) -> Callable[[Array], T]:
    """A function that works in a thread of its own, so that the calling one can be interrupted at once.

    What goes on in vain then ends unseen; the interpreter's own end waits for it, since LAPACK would crash.
    """

    def waiting(given: Array) -> T:
        done: SimpleQueue[tuple[T, None] | tuple[None, Exception]] = SimpleQueue()

        def work() -> None:
            try:
                done.put((function(given), None))
            except Exception as error:
                done.put((None, error))

        threading.Thread(target=work).start()
        while True:
            # An interrupt just before it begins to wait does not wake it.
            with suppress(Empty):
                found, error = done.get(timeout=0.1)
                break
        if error is not None:
            raise error
        return found  # type: ignore[return-value]

    return waiting
