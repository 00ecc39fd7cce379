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


def exact_objective(R, C, M, lam, group_size=1, weights=None):
    """``objective`` where terms may cancel, in extended precision; of a stack of M one each."""
    R, C, M = (np.asarray(values, np.longdouble) for values in (R, C, M))
    weights = np.ones(len(R) // group_size) if weights is None else weights
    norms = np.sqrt(np.square(M).sum(-2).reshape(*M.shape[:-2], -1, group_size).sum(-1))
    fit = 0.5 * ((M @ R) * M).sum((-2, -1)) - (C * M).sum((-2, -1))
    return (fit + lam * (weights * norms).sum(-1)).astype(float)[()]


def lowest_found(R, C, M, lam, group_size=1, weights=None, shift=0.0):
    """The lowest objective on the way of reweighted ridge fits down from M, with ridges of all sizes.

    With a shift, of the fits that it says something about: P itself has no minimum then.
    """
    weights = np.ones(len(R) // group_size) if weights is None else weights
    best = exact_objective(R, C, M, lam, group_size, weights)
    largest = 2 * np.square(M).sum(0) @ np.diag(R) if shift else np.inf
    ridges = 10.0 ** np.arange(-15, -6, 2)
    # A fit with each of the ridges, all at once.
    N = np.repeat(M[None], len(ridges), 0)
    for _ in range(60):
        norms = np.sqrt(np.square(N).sum(1).reshape(len(N), -1, group_size).sum(2))
        pull = lam * weights / np.maximum(norms, 1e-12 * np.where(norms.any(1), norms.max(1), 1.0)[:, None])
        A = R + np.repeat(pull, group_size, 1)[:, :, None] * np.eye(len(R))
        diagonal = np.diagonal(A, axis1=1, axis2=2)
        unit = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))[:, None]
        A = A / unit / unit.mT + ridges[:, None, None] * np.eye(len(R))
        N = _solved(A, (C / unit).mT).mT / unit
        told = np.square(N).sum(1) @ np.diag(R) <= largest
        if told.any():
            best = min(best, exact_objective(R, C, N[told], lam, group_size, weights).min())
    return best


def _solved(A, B):
    """Solutions of a stack of systems; the shortest where one is singular in double precision."""
    try:
        return np.linalg.solve(A, B)
    except np.linalg.LinAlgError:
        return np.stack([np.linalg.lstsq(a, b)[0] for a, b in zip(A, B, strict=True)])


def published_problem(d, h, r, n, seed=0):
    """The random problem of the published experiment, in its own scaling: correlations divided by d."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((d, r)) @ rng.standard_normal((r, n))
    y = rng.standard_normal((h, d)) @ x
    return (x / d) @ (x.T / n), (y / d) @ (x.T / n)


def columns_of(groups, group_size):
    return (np.asarray(groups, dtype=int)[:, None] * group_size + np.arange(group_size)).ravel()


def support_error(R, C, keep, group_size=1, ridge=0.0):
    """min_M ½⟨M R, M⟩ − ⟨C, M⟩ over M on the groups ``keep``, the diagonal of R raised by the share ridge."""
    columns = columns_of(keep, group_size)
    columns = columns[np.diag(R)[columns] > 0]
    unit = np.sqrt(np.diag(R)[columns])
    A = R[np.ix_(columns, columns)] / unit / unit[:, None] + ridge * np.eye(len(columns))
    values, vectors = np.linalg.eigh(A) if len(columns) else (np.zeros(0), np.zeros((0, 0)))
    sound = values > 1e-13 * len(A) * values.max(initial=0.0)
    return -0.5 * np.sum(np.square((C[:, columns] / unit) @ vectors[:, sound]) / values[sound])


def eliminate(R, C, group_size=1, ridge=0.0):
    """Group OBS by recomputing everything: order of removal and the error with 0, 1, … groups kept."""
    left = list(range(len(R) // group_size))
    order, error = [], [support_error(R, C, left, group_size, ridge)]
    while left:
        errors = [support_error(R, C, [g for g in left if g != p], group_size, ridge) for p in left]
        order.append(left.pop(int(np.argmin(errors))))
        error.append(min(errors))
    return order, error[::-1]
