"""Eigenvalues are LAPACK's; an interrupt does not wait for them."""

import os
import signal
import threading

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from pysolve.solve import lapack
from pysolve.solve.lapack import answering, eigh


@given(st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_eigenvalues_are_those_of_lapack(d, seed, generalised):
    X, Y = np.random.default_rng(seed).standard_normal((2, d, 2 * d))
    A, B = X @ X.T, Y @ Y.T + np.eye(d) if generalised else None
    values, vectors = eigh(A, B)
    largest = values[-1]
    np.testing.assert_allclose(values, scipy.linalg.eigh(A, B)[0], atol=1e-11 * largest)
    right = vectors if B is None else B @ vectors
    np.testing.assert_allclose(A @ vectors, right * values, atol=1e-9 * largest)
    np.testing.assert_allclose(vectors.T @ right, np.eye(d), atol=1e-9)


def test_large_ones_are_the_same_to_the_bit(monkeypatch):
    X = np.random.default_rng(0).standard_normal((20, 30))
    expected = eigh(X @ X.T)
    monkeypatch.setattr(lapack, "_LARGE", 1)
    assert all(map(np.array_equal, eigh(X @ X.T), expected))


def test_errors_come_through():
    with pytest.raises(np.linalg.LinAlgError):
        answering(np.linalg.cholesky)(-np.eye(3))


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_does_not_wait():
    begun, released, ended = threading.Event(), threading.Event(), threading.Event()

    def endless(A):
        begun.set()
        released.wait()
        ended.set()

    def interrupt():
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        answering(endless)(np.eye(2))
    assert not ended.is_set()
    released.set()
    assert ended.wait(60)
