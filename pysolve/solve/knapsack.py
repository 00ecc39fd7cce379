"""One size for each of several items whose sizes multiply in the cost, by greedy removal and exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pysolve.plan import Array, Indices

# Steps from all of a site to nothing: of removal, and of restoring (first in coarse ones).
STEPS, RESTORE = 256, (32, 256)
# Sizes of a site that an exchange tries: all of them up to this number, otherwise near and a few far ones.
TRIED = 64
# Searches for an exchange per site; random networks of 150 sites settle within 3.
ROUNDS = 10


@dataclass(frozen=True, eq=False)
class Knapsack:
    """min_k Σ_s D_s(k_s)  subject to  constant_t + gradient_t·k + ½ kᵀ hessian_t k ≤ limit_t .

    A row of ``sizes`` (S, N) has the values of k_s, ascending; short ones end with their last size repeated,
    ``counts`` (S,) are different. ``divergences`` (S, N) has D of each, which does not rise along a row. The
    costs, of (T,) constants, (T, S) gradients and symmetric (T, S, S) hessians, rise with every k_s. Where
    sizes count for other numbers in the costs, ``seen`` (T, S, N), not falling along a row, has those.
    """

    sizes: Array
    divergences: Array
    counts: Indices
    limits: Array
    constant: Array
    gradient: Array
    hessian: Array
    seen: Array | None = None

    def at(self, chosen: Indices) -> Array:
        """Sizes at (…, S) indices as the costs see them: (1 or T, …, S)."""
        return pick(self.sizes[None] if self.seen is None else self.seen, chosen)

    def divergence(self, chosen: Indices) -> float:
        """Sum over the sites."""
        return float(pick(self.divergences, chosen).sum())

    def costs(self, k: Array) -> tuple[Array, Array]:
        """(T,) costs and (T, S) derivatives, at (1 or T, S) sizes."""
        slope = self.gradient + (self.hessian @ k[..., None])[..., 0]
        return self.constant + (0.5 * (self.gradient + slope) * k).sum(-1), slope

    @property
    def bend(self) -> Array:
        """(T, S): moving site s alone by d costs d slope_s + bend_s d²."""
        return 0.5 * np.diagonal(self.hessian, axis1=1, axis2=2)

    @property
    def shares(self) -> Array:
        """(T, 1) factors from costs to shares of the limits."""
        return 1.0 / np.where(self.limits > 0, self.limits, 1.0)[:, None]


def pick(table: Array, chosen: Indices) -> Array:
    """(…, S) entries of an (S, N) table at (…, S) indices; of several tables, (T, …, S)."""
    return table[..., np.arange(table.shape[-2]), chosen]


def pack(sizes: Sequence[Array], divergences: Sequence[Array]) -> tuple[Array, Array, Indices]:
    """Rows of different lengths as the two tables and the counts of a Knapsack."""
    longest = max(map(len, sizes), default=1)
    tables = [
        np.array([np.pad(row, (0, longest - len(row)), mode="edge") for row in rows], dtype=float)
        for rows in (sizes, divergences)
    ]
    return tables[0].reshape(-1, longest), tables[1].reshape(-1, longest), np.array([*map(len, sizes)], int)


def solve(problem: Knapsack, near: Array | None = None) -> Array:
    """(S,) sizes within the limits, which the smallest sizes must be; none can be raised to the next.

    ``near`` (S,): sizes to start from, of a problem that hardly differs; a search of its own takes longer.

    Sizes fall where the divergence, on the lower convex hulls of the curves, rises least per cost saved at
    the widths reached so far, and are restored while they fit; then sites exchange channels in pairs while
    the sum falls. Optimal for up to two sites of up to 64 sizes; on random networks of 3 or 4 small sites
    less than 1 % above the optimum on average.
    """
    # Removal alone can end up where no exchange of two sites helps; so can raising, but seldom both.
    if near is not None:
        return pick(problem.sizes, _exchange(problem, _remove(problem, near)))
    starts = _remove(problem), np.zeros_like(problem.counts)
    return pick(problem.sizes, min((_exchange(problem, start) for start in starts), key=problem.divergence))


def _remove(problem: Knapsack, near: Array | None = None) -> Indices:
    """Down the convex hulls from all, the least divergence per cost saved first, until the limits hold."""
    stops = [_stops(problem, s) for s in range(len(problem.counts))]
    chosen, hulls, counts = pack([c.astype(float) for c, _ in stops], [h for _, h in stops])
    index = chosen.astype(np.intp)
    few = replace(
        problem,
        sizes=np.take_along_axis(problem.sizes, index, 1),
        divergences=hulls,
        counts=counts,
        seen=None if problem.seen is None else np.take_along_axis(problem.seen, index[None], 2),
    )
    at, bend = counts - 1, problem.bend
    if near is not None:
        at = np.minimum([int(np.searchsorted(s, k)) for s, k in zip(few.sizes, near, strict=True)], at)
    while True:
        k, below = few.at(at), np.maximum(at - 1, 0)
        cost, slope = problem.costs(k)
        unmet = cost > problem.limits
        step = k - few.at(below)
        saved = np.sum((step * (slope - bend * step) * problem.shares)[unmet], axis=0)
        rate = _rate(pick(hulls, below) - pick(hulls, at), saved)
        if np.isinf(rate).all():
            return index[np.arange(len(at)), at]
        at[int(np.argmin(rate))] -= 1


def _stops(problem: Knapsack, s: int) -> tuple[Indices, Array]:
    """Up to STEPS + 1 indices of sizes of a site, and the convex hull of their divergences."""
    n = int(problem.counts[s])
    chosen = np.unique(np.linspace(0, n - 1, min(n, STEPS + 1)).round().astype(np.intp))
    # A hull over several measures is that over their mean.
    k = problem.sizes[s, chosen] if problem.seen is None else problem.seen[:, s, chosen].mean(0)
    divergence = problem.divergences[s, chosen]
    x, y, hull = k.tolist(), divergence.tolist(), [0]
    for i in range(1, len(x)):
        while len(hull) > 1 and _above(x, y, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return chosen, np.interp(k, k[hull], divergence[hull])


def _above(x: list[float], y: list[float], a: int, b: int, c: int) -> bool:
    """Whether point b lies on or above the line from a to c."""
    return (y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a])


def _raise_sizes(problem: Knapsack, chosen: Indices) -> Indices:
    """Raise sizes while one fits, the largest fall of divergence per cost first."""
    chosen, bend = chosen.copy(), problem.bend
    for unit in (*(np.maximum(problem.counts // steps, 1) for steps in RESTORE), np.ones_like(chosen)):
        while True:
            above = np.minimum(chosen + unit, problem.counts - 1)
            k = problem.at(chosen)
            step = problem.at(above) - k
            cost, slope = problem.costs(k)
            paid = step * (slope + bend * step)
            fits = (above > chosen) & np.all(cost[:, None] + paid <= problem.limits[:, None], axis=0)
            if not fits.any():
                break
            gain = pick(problem.divergences, chosen) - pick(problem.divergences, above)
            price = np.sum(paid * problem.shares, axis=0)
            s = int(np.argmax(np.where(fits, _rate(gain, price), -1.0)))
            chosen[s] = above[s]
    return chosen


def _rate(divergence: Array, cost: Array) -> Array:
    """Divergence per cost; infinite where there is no cost."""
    return np.where(cost > 0, divergence / np.where(cost > 0, cost, 1.0), np.inf)


def _exchange(problem: Knapsack, start: Indices) -> Indices:
    """Change two sites at a time while that lowers the divergence; then no size can be raised."""
    chosen, count = _raise_sizes(problem, start), len(start)
    s = idle = tries = 0
    while idle < count > 1 and tries < ROUNDS * count:
        gain, pair, sizes = _best_pair(problem, chosen, s)
        tries += 1
        if gain > 1e-9 * problem.divergence(chosen):
            chosen[pair], idle = sizes, 0
        else:
            s, idle = (s + 1) % count, idle + 1
    return _raise_sizes(problem, chosen)


def _best_pair(problem: Knapsack, chosen: Indices, s: int) -> tuple[float, list[int], list[int]]:
    """The largest fall of divergence when site s and one other change, the two sites, and their sizes."""
    k, tried = problem.at(chosen), _near(int(chosen[s]), int(problem.counts[s]))
    (cost, slope), bend = problem.costs(k), problem.bend
    step = (problem.sizes[None] if problem.seen is None else problem.seen)[:, s, tried] - k[:, [s]]
    slack = (problem.limits - cost)[:, None] - step * (slope[:, [s]] + bend[:, [s]] * step)
    # (T, tried, S): slope of the cost in every other site, once s has moved.
    slope = slope[:, None, :] + step[:, :, None] * problem.hessian[:, None, s, :]
    low = np.full((len(tried), k.shape[-1]), -1)
    high = np.broadcast_to(problem.counts - 1, low.shape)
    for _ in range(problem.sizes.shape[1].bit_length()):
        middle = (low + high + 1) // 2
        move = problem.at(middle) - k[:, None, :]
        fits = np.all(move * (slope + bend[:, None, :] * move) <= slack[:, :, None], axis=0)
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    divergence = problem.divergences[s, tried][:, None] + pick(problem.divergences, low)
    fall = problem.divergences[s, chosen[s]] + pick(problem.divergences, chosen) - divergence
    fall[low < 0] = -np.inf
    fall[:, s] = -np.inf
    i, other = np.unravel_index(int(np.argmax(fall)), fall.shape)
    return float(fall[i, other]), [s, int(other)], [int(tried[i]), int(low[i, other])]


def _near(now: int, count: int) -> Indices:
    """Indices below ``count`` to try in place of ``now``."""
    if count <= TRIED:
        return np.arange(count)
    steps = np.geomspace(1, count, TRIED // 2).round().astype(np.intp)
    return np.unique(np.clip(np.concatenate([now - steps, [now], now + steps]), 0, count - 1))
