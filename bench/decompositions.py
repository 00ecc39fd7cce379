"""One layer at low rank by one decomposition, beside torch's randomised one of the same matrix."""

import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch

from pysolve.correlations import Array, Correlations
from pysolve.layer.reduced_rank import factor_layer
from pysolve.layer.spectrum import activation_spectrum, plain_spectrum
from pysolve.solve.least_squares import prior_ridge


def decomposed(size: int, rank: int) -> dict[str, float]:
    """One square layer: CPU seconds, and what the peer loses over what we lose."""
    W, correlations = random_layer(size)
    ridge = prior_ridge(size, correlations.count)
    G = correlations.centered().r_xx
    G += ridge * np.diag(np.diag(G))
    row: dict[str, float] = {"size": size, "rank": rank}
    row["weights (s)"], plain = timed(lambda: plain_spectrum(W, rank).factors(rank).dense())
    row["torch (s)"], theirs = timed(lambda: by_torch(W, rank))
    row["torch error / ours"] = lost(W - theirs, None) / lost(W - plain, None)
    row["by what is read (s)"], ours = timed(
        lambda: activation_spectrum(W, correlations, rank).factors(rank).dense()
    )
    row["with the bias (s)"], _ = timed(lambda: factor_layer(W, correlations, rank).weight)
    row["torch, whitened (s)"], theirs = timed(lambda: whitened_by_torch(W, G, rank))
    row["its error / ours"] = lost(W - theirs, G) / lost(W - ours, G)
    row["weights' error / ours"] = lost(W - plain, G) / lost(W - ours, G)
    return row


def random_layer(size: int) -> tuple[Array, Correlations]:
    """Weights and inputs whose energies fall as in trained networks."""
    rng = np.random.default_rng(0)
    falling = (1 + np.arange(size)) ** -0.5
    W = (rng.standard_normal((size, size)) * falling) @ rng.standard_normal((size, size)) / size
    x = np.maximum((rng.standard_normal((2 * size, size)) * falling) @ rng.standard_normal((size, size)), 0)
    return W, Correlations.from_samples(x, x @ W.T)


def by_torch(W: Array, rank: int) -> Array:
    """Randomised singular value decomposition, as torch's default has it but for the rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        U, s, V = torch.svd_lowrank(torch.from_numpy(W), q=rank)
    return (U * s @ V.T).numpy()


def whitened_by_torch(W: Array, G: Array, rank: int) -> Array:
    """The same of W L, with L Lᵀ = G, and L taken back: what minimises the error at the outputs."""
    L = scipy.linalg.cholesky(G, lower=True, check_finite=False)
    flat = by_torch(W @ L, rank)
    return scipy.linalg.solve_triangular(L, flat.T, lower=True, trans="T", check_finite=False).T


def timed(run: Callable[[], Array]) -> tuple[float, Array]:
    """Processor seconds, and the result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def lost(D: Array, G: Array | None) -> float:
    """‖D‖², or tr(D G Dᵀ)."""
    return float(np.vdot(D, D if G is None else D @ G))
