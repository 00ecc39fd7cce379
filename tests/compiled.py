"""A call of every compiled function, on small data; what each gives, as arrays."""

from contextlib import contextmanager

import numpy as np
import pytest
import scipy.sparse as sp

import pysolve as ps
from pysolve import _core
from pysolve.layer.sparse_matrix import get_num_threads, set_num_threads

RNG = np.random.default_rng(0)
X = RNG.standard_normal((80, 12))
XX = np.ascontiguousarray(X.T @ X / 80)
W = RNG.standard_normal((5, 12))
YX = W @ XX
KNOWN = ps.Correlations.from_samples(X, X @ W.T)
CSR = sp.random(60, 70, 0.2, "csr", np.float32, rng=0)
MATRIX, BATCH = ps.SparseMatrix.from_csr(CSR), RNG.standard_normal((9, 70)).astype(np.float32)
NARROW = RNG.standard_normal((9, 60)).astype(np.float32)
SOLVERS = ("alternate_minimization", "fista", "newton", "proximal_gradient")
SELECTORS = ("elimination", "forward", "swap")
SCHEMES = ({"scheme": "int", "bits": 3}, {"scheme": "codebook", "bits": 2})


@contextmanager
def running(level=None, threads=1):
    """Another level and number of threads inside."""
    before = _core.level(), get_num_threads()
    try:
        _core.set_level(level or before[0])
        set_num_threads(threads)
        yield
    finally:
        _core.set_level(before[0])
        set_num_threads(before[1])


def stopped(*told):
    raise ValueError("enough")


def refused():
    with pytest.raises(ValueError, match="enough"):
        ps.solve_linear_reconstruction(XX, YX, 1e-3, "fista", callback=stopped)
    return ()


def cholesky():
    R = XX + np.eye(12)
    assert _core.cholesky(R)
    return (R,)


CALLS = {
    "lam_max": lambda: (ps.lam_max(XX, YX),),
    "prox": lambda: (ps.prox_group_lasso(W, 0.1, group_size=3),),
    "refused by a callback": refused,
    "prepare": lambda: (ps.SparseMatrix.from_csr(CSR).to_csr().data,),
    "multiply": lambda: (MATRIX.matmul(BATCH),),
    "gradient": lambda: (MATRIX.value_gradient(NARROW, BATCH),),
    "cholesky": cholesky,
    "rows": lambda: (*_core.eliminate_rows(np.linalg.inv(XX), np.ascontiguousarray(YX)),),
    "obs": lambda: (ps.obs_prune(W, KNOWN, amount=0.5).weight,),
    **{
        f"select {name}": lambda name=name: (ps.select_channels(KNOWN, 4, method=name),) for name in SELECTORS
    },
    **{
        f"quantize {given['scheme']}": lambda given=given: (
            ps.quantize_layer(W, KNOWN, **given).form.dense(),
        )
        for given in SCHEMES
    },
    **{
        name: lambda name=name: (ps.solve_linear_reconstruction(XX, YX, 1e-2, name, max_iter=20).M,)
        for name in SOLVERS
    },
}
