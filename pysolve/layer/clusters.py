"""Exact k-means on a line: the k values that represent many with the least squared error."""

from __future__ import annotations

import numpy as np

from pysolve.correlations import AnyArray, Array, Indices

# Different values up to which the clusters are exact; more are gathered in so many bins first.
BINS = 4096
_ROUNDS = 50
# Places up to which all costs at once take less time than halving.
_FEW = 128


def k_means(values: AnyArray, k: int, weights: AnyArray | None = None) -> Array:
    """The k centres of least weighted squared distance to the values.

    Solves  min_c  Σ_i w_i min_a (v_i − c_a)²  exactly where there are at most 4,096 different values. More
    are gathered in as many bins first, and Lloyd's iterations on the values themselves follow.

    Weights ≥ 0 are broadcast to the values, and all 1 where all are 0. Centres ascend; they are fewer than k
    where there are fewer different values that count.

    References
    ----------
    H. Wang, M. Song, Ckmeans.1d.dp: optimal k-means clustering in one dimension, 2011.
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    share = np.ones(flat.shape) if weights is None else np.broadcast_to(weights, np.shape(values)).ravel()
    if not share.any():
        share = np.ones(flat.shape)
    order = np.argsort(flat[share > 0])
    flat, share = flat[share > 0][order], share[share > 0][order].astype(np.float64)
    places, masses = _merged(flat, share, _starts(flat))
    centres = _exact(places, masses, k)
    return centres if len(places) == len(np.unique(flat)) else _lloyd(flat, share, centres)


def nearest(values: AnyArray, centres: Array) -> Indices:
    """Index of the nearest of ascending centres; the lower one of two."""
    return np.searchsorted(0.5 * (centres[1:] + centres[:-1]), values)


def _starts(ascending: Array) -> Indices:
    """Starts of the runs of equal values, or of bins: half of equal width, half of as many values."""
    first = np.flatnonzero(np.diff(ascending, prepend=-np.inf))
    if len(first) <= BINS:
        return first
    low, high, half = ascending[0], ascending[-1], BINS // 2
    wide = np.minimum((ascending / (high - low) - low / (high - low)) * half, half - 1).astype(np.intp)
    # Beside outliers, bins of one width would leave a single bin for all other values.
    many = np.arange(len(ascending)) * half // len(ascending)
    return np.flatnonzero(np.diff(wide + many, prepend=-1))


def _merged(values: Array, weights: Array, starts: Indices) -> tuple[Array, Array]:
    """Mean and weight of runs of the values."""
    if not len(starts):
        return values, weights
    masses = np.add.reduceat(weights, starts)
    # Around a value of the run itself: nothing cancels, and runs of equal values keep theirs exactly.
    spread = values - np.repeat(values[starts], np.diff(starts, append=len(values)))
    return values[starts] + np.add.reduceat(weights * spread, starts) / masses, masses


def _exact(places: Array, masses: Array, k: int) -> Array:
    """The best k centres of ascending places, by dynamic programming over the start of the last cluster.

    Those beginnings ascend with the end, so all ends of one size are found by halving: k n log n steps.
    """
    n = len(places)
    if n <= k:
        return places
    peak = np.abs(places - places.mean()).max()
    around = (places - np.average(places, weights=masses)) / peak
    sums = np.zeros((3, n + 1))
    np.cumsum(masses / masses.sum() * around ** np.arange(3)[:, None], axis=1, out=sums[:, 1:])
    best, begins = _cost(sums, np.zeros(n, np.intp), np.arange(1, n + 1)), np.zeros((k, n), np.intp)
    table = _all_costs(sums) if n <= _FEW else None
    for size in range(1, k):
        found = None if table is None else _one_more_of_few(table, best, size)
        best, begins[size] = _one_more(sums, best, size) if found is None else found
    ends, starts = n, []
    for size in range(k - 1, -1, -1):
        starts.append(begins[size, ends - 1])
        ends = starts[-1]
    return _merged(places, masses, np.array(starts[::-1]))[0]


def _cost(sums: Array, first: Indices, end: Indices) -> Array:
    """Weighted squared distance of places first … end − 1 to their mean."""
    mass, moment, energy = sums[:, end] - sums[:, first]
    # Next to much heavier ones, places can have no mass left.
    return np.asarray(np.maximum(energy - moment * moment / np.where(mass > 0, mass, np.inf), 0.0))


def _all_costs(sums: Array) -> Array:
    """Costs of places b … e as one cluster, a row for each e; infinite where b > e."""
    places = np.arange(sums.shape[1] - 1)
    costs = _cost(sums, places[None, :], places[:, None] + 1)
    return np.where(places[None, :] <= places[:, None], costs, np.inf)


def _one_more_of_few(table: Array, best: Array, size: int) -> tuple[Array, Indices] | None:
    """``_one_more`` by trying everything; None where ties leave beginnings that do not ascend."""
    costs, begins = np.zeros(len(best)), np.arange(len(best))
    sums = table[size:, size:] + best[size - 1 : -1]
    begin = sums.argmin(1)
    if (begin[1:] < begin[:-1]).any():
        return None
    costs[size:], begins[size:] = sums[np.arange(len(sums)), begin], begin + size
    return costs, begins


def _one_more(sums: Array, best: Array, size: int) -> tuple[Array, Indices]:
    """Least costs of places 0 … e, for every e, in ``size`` + 1 clusters, and the start of the last one.

    Entries before e = size have too few places: cost 0, and every place for itself.
    """
    n = len(best)
    costs, begins = np.zeros(n), np.arange(n)
    step = 1 << (n - size).bit_length()
    while step := step // 2:
        end = np.arange(size + step - 1, n, 2 * step)
        before, after = end - step, end + step
        low = np.where(before >= size, begins[np.maximum(before, 0)], size)
        high = np.where(after < n, np.minimum(begins[np.minimum(after, n - 1)], end), end)
        costs[end], begins[end] = _least(sums, best, low, high, end)
    return costs, begins


def _least(sums: Array, best: Array, low: Indices, high: Indices, end: Indices) -> tuple[Array, Indices]:
    """min and argmin of best[b − 1] + cost of places b … end, over b = low … high, for every end."""
    counts = high - low + 1
    starts = np.cumsum(counts) - counts
    begin = np.arange(counts.sum()) + np.repeat(low - starts, counts)
    costs = best[begin - 1] + _cost(sums, begin, np.repeat(end + 1, counts))
    least = np.minimum.reduceat(costs, starts)
    hits = np.flatnonzero(costs == np.repeat(least, counts))
    return least, begin[hits[np.searchsorted(hits, starts)]]


def _lloyd(values: Array, weights: Array, centres: Array) -> Array:
    """Lloyd's iterations on ascending values until no value changes its cluster."""
    middle = values.mean()
    sums = np.zeros((2, len(values) + 1))
    np.cumsum([weights, weights * (values - middle)], axis=1, out=sums[:, 1:])
    last: Indices | None = None
    for _ in range(_ROUNDS):
        cuts = np.searchsorted(values, 0.5 * (centres[1:] + centres[:-1]), side="right")
        if last is not None and np.array_equal(cuts, last):
            break
        last = cuts
        mass, moment = np.diff(sums[:, np.concatenate([[0], cuts, [len(values)]])])
        centres = np.where(mass > 0, middle + moment / np.where(mass > 0, mass, 1.0), centres)
    return centres
