"""No compiled function keeps memory: that of the process does not grow over many calls."""

import gc
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

import pysolve as ps
from pysolve import _core

RNG = np.random.default_rng(0)
X = RNG.standard_normal((80, 12))
XX = np.ascontiguousarray(X.T @ X / 80)
YX = RNG.standard_normal((5, 12)) @ XX
CSR = sp.random(60, 70, 0.2, "csr", np.float32, rng=0)
MATRIX, BATCH = ps.SparseMatrix.from_csr(CSR), RNG.standard_normal((9, 70)).astype(np.float32)
NARROW = RNG.standard_normal((9, 60)).astype(np.float32)
METHODS = ("alternate_minimization", "fista", "newton", "proximal_gradient")
# Of calls that take long.
FEWER = {"eliminate": 2000, "newton": 2000}


def stopped(*told):
    raise ValueError("enough")


def refused():
    with pytest.raises(ValueError, match="enough"):
        ps.solve_linear_reconstruction(XX, YX, 1e-3, "fista", callback=stopped)


CALLS = {
    "lam_max": lambda: ps.lam_max(XX, YX),
    "refused by a callback": refused,
    "eliminate": lambda: ps.select_channels(ps.Correlations.from_samples(X, X), 4),
    "prepare": lambda: ps.SparseMatrix.from_csr(CSR),
    "multiply": lambda: MATRIX.matmul(BATCH),
    "gradient": lambda: MATRIX.value_gradient(NARROW, BATCH),
    "cholesky": lambda: _core.cholesky(XX + np.eye(12)),
    "rows": lambda: _core.eliminate_rows(np.linalg.inv(XX), np.ascontiguousarray(YX)),
    **{
        name: (lambda name=name: ps.solve_linear_reconstruction(XX, YX, 1e-2, name, max_iter=20))
        for name in METHODS
    },
}


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_memory_of_the_process_does_not_grow(name):
    call = CALLS[name]
    for _ in range(1000):
        call()
    gc.collect()
    before = resident()
    for _ in range(FEWER.get(name, 10_000)):
        call()
    gc.collect()
    # A kept kilobyte a call would be ten times as much.
    assert resident() - before < 1 << 20
