"""The published algorithms, transcribed straight into NumPy: what a user would run without pysolve.

Each is a generator of iterates, so that the runner decides when to stop and charges no stopping test.
"""

from collections.abc import Iterator

import numpy as np


def shrink(V: np.ndarray, threshold: float) -> np.ndarray:
    norms = np.linalg.norm(V, axis=0)
    return V * np.maximum(0, 1 - threshold / np.maximum(norms, 1e-300))


def proximal_gradient(R: np.ndarray, C: np.ndarray, lam: float) -> Iterator[np.ndarray]:
    L = np.linalg.norm(R, 2)
    M = np.zeros_like(C)
    while True:
        M = shrink(M - (M @ R - C) / L, lam / L)
        yield M


def fista(
    R: np.ndarray, C: np.ndarray, lam: float, M: np.ndarray | None = None, q: int = 10
) -> Iterator[np.ndarray]:
    L = np.linalg.norm(R, 2)
    M = np.zeros_like(C) if M is None else M
    before, k = M, 1
    while True:
        V = M + (k - 1) / (k + q + 2) * (M - before)
        before, M = M, shrink(V - (V @ R - C) / L, lam / L)
        k += 1
        yield M


def alternate_minimization(
    R: np.ndarray, C: np.ndarray, lam: float, rounds: int = 50
) -> Iterator[np.ndarray]:
    M = np.ones_like(C)
    for _ in range(rounds):
        u = np.sqrt(np.sum(M**2, axis=0) + 1e-10)
        M = np.linalg.solve(R + lam * np.diag(1 / u), C.T).T
        yield M
    yield from fista(R, C, lam, M)


def published_stop(
    iterates: Iterator[np.ndarray], *, unconditional: int = 0, limit: int = 100_000
) -> np.ndarray:
    """Run ``unconditional`` iterations, then until δ ← ½ δ + ‖ΔM‖/‖M‖ is at most 1e-8: the published rule."""
    before, delta = next(iterates), 1.0
    for k, M in enumerate(iterates, start=2):
        if k > unconditional:
            delta = 0.5 * delta + np.linalg.norm(M - before) / np.linalg.norm(M)
        if delta <= 1e-8 or k >= limit:
            return M
        before = M
    raise AssertionError("the iterates of a contender do not end")
