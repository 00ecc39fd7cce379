"""Slow, obvious NumPy versions of what the core computes."""

import numpy as np


def groups_of(V, group_size):
    """Columns of each group, as a list of (h, group_size) views."""
    return [V[:, i : i + group_size] for i in range(0, V.shape[1], group_size)]


def prox(V, t, group_size=1, weights=None):
    weights = np.ones(V.shape[1] // group_size) if weights is None else weights
    shrunk = []
    for block, weight in zip(groups_of(V, group_size), weights, strict=True):
        norm = np.linalg.norm(block)
        shrunk.append(block * max(0.0, 1.0 - t * weight / norm) if norm > 0 else block)
    return np.hstack(shrunk)


def objective(R, C, M, lam, group_size=1, weights=None):
    weights = np.ones(M.shape[1] // group_size) if weights is None else weights
    norms = [np.linalg.norm(block) for block in groups_of(M, group_size)]
    return 0.5 * np.trace(M @ R @ M.T) - np.trace(C @ M.T) + lam * np.dot(weights, norms)


def proximal_gradient(R, C, lam, group_size=1, weights=None, iterations=1000):
    L = np.linalg.eigvalsh(R)[-1]
    M = np.zeros_like(C)
    for _ in range(iterations):
        M = prox(M - (M @ R - C) / L, lam / L, group_size, weights)
    return M


def published_problem(d, h, r, n, seed=0):
    """The random problem of the published experiment, in its own scaling: correlations divided by d."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((d, r)) @ rng.standard_normal((r, n))
    y = rng.standard_normal((h, d)) @ x
    return (x / d) @ (x.T / n), (y / d) @ (x.T / n)
