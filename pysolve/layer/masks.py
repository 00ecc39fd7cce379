"""Masks of the weights to keep: unstructured pruning by a score of every weight."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pysolve.correlations import AnyArray, Array, Mask
from pysolve.errors import exactly_one, one_of

Scores = AnyArray
Weights = Mapping[str, AnyArray]
PerLayer = float | Mapping[str, float]

METHODS = ("magnitude", "random", "std", "wanda")
SCOPES = ("local", "global")


def masks(
    weights: Weights,
    amount: PerLayer | None = None,
    *,
    method: str = "magnitude",
    threshold: PerLayer | None = None,
    sensitivity: PerLayer | None = None,
    pattern: str | None = None,
    scope: str = "local",
    second_moments: Mapping[str, npt.ArrayLike] | None = None,
    seed: int = 0,
) -> dict[str, Mask]:
    """Keep the weights with the largest scores, or those whose scores reach a threshold.

    Maximises the sum of the kept scores under a given number of weights; exactly one of ``amount``,
    ``threshold``, ``sensitivity`` and ``pattern`` gives that number.

    Parameters
    ----------
    weights : {layer: array}
        The first axis is the output; the others together are the inputs, in the order of ``flatten(1)``.
    amount : float or {layer: float}
        Share of the weights to remove, in [0, 1); with a mapping, layers without an entry keep all.
    method : "magnitude", "random", "std" or "wanda"
        The score: |w|, a random number, |w| / std(w of the layer), or |w_ij| sqrt(E[x_j²]).
    threshold : float or {layer: float}
        |w| below it is removed; for "magnitude".
    sensitivity : float or {layer: float}
        |w| below this many standard deviations of the layer's weights is removed; for "std".
    pattern : str
        As "2:4": of every 4 consecutive inputs of an output, 2 are kept; of an incomplete last group as many,
        or all.
    scope : "local" or "global"
        The share of each layer (with "wanda", of each output), or of all together. Globally, "magnitude"
        compares |w| as they are, "std" by each layer's deviation, "wanda" by the shares that they have of
        their layer's Σ w_ij² E[x_j²].
    second_moments : {layer: (inputs,) array}
        E[x_j²], the diagonal of a layer's correlations; for "wanda".
    seed : int
        Of random scores.

    Returns
    -------
    {layer: bool array}
        True for the kept weights. Of an amount exactly ⌊share · size⌋ weights are removed; zeros count as
        weights, and of equal ones the first are kept.

    Raises
    ------
    ValueError
        For unknown words, numbers out of range, or settings that do not go together.

    References
    ----------
    M. Sun et al., A simple and effective pruning approach for large language models, 2024 ("wanda").
    """
    _check(weights, method, scope, amount, threshold, sensitivity, pattern)
    moments = _moments(weights, second_moments) if method == "wanda" else {}
    rng = np.random.default_rng(seed)
    scored = {name: _scores(w, method, moments.get(name), rng) for name, w in weights.items()}
    if pattern is not None:
        n, m = parse_pattern(pattern)
        return {name: keep_pattern(score, n, m) for name, score in scored.items()}
    limit = threshold if amount is None and threshold is not None else sensitivity
    if limit is not None:
        limits = limit if isinstance(limit, Mapping) else dict.fromkeys(weights, limit)
        return {name: score >= limits.get(name, -np.inf) for name, score in scored.items()}
    if scope == "global":
        assert not isinstance(amount, Mapping)
        return _together(scored, float(amount or 0), wanda=method == "wanda")
    shares = amount if isinstance(amount, Mapping) else dict.fromkeys(weights, amount)
    keep = _rows_left if method == "wanda" else _left
    return {name: keep(score, float(shares.get(name) or 0)) for name, score in scored.items()}


def keep_largest(scores: Scores, count: int) -> Mask:
    """The ``count`` largest; of equal ones the first."""
    flat = scores.ravel()
    keep = np.zeros(flat.size, bool)
    if count >= flat.size:
        keep[:] = True
    elif count > 0:
        least = np.partition(flat, flat.size - count)[flat.size - count]
        np.greater(flat, least, out=keep)
        keep[np.flatnonzero(flat == least)[: count - np.count_nonzero(keep)]] = True
    return keep.reshape(scores.shape)


def keep_in_rows(scores: Scores, count: int) -> Mask:
    """The ``count`` largest of every row of a matrix; of equal ones the first."""
    h, d = scores.shape
    if count <= 0 or count >= d:
        return np.full((h, d), count > 0)
    least = np.partition(scores, d - count, axis=1)[:, [d - count]]
    keep, ties = scores > least, scores == least
    missing = count - keep.sum(1, keepdims=True)
    return np.asarray(keep | (ties & (np.cumsum(ties, axis=1) <= missing)))


def keep_pattern(scores: Scores, n: int, m: int) -> Mask:
    """The n largest of every m consecutive inputs of each output, and of an incomplete group at the end."""
    if not scores.size:
        return np.ones(scores.shape, bool)
    rows = scores.reshape(len(scores), -1)
    whole = rows.shape[1] // m * m
    keep = np.ones(rows.shape, bool)
    keep[:, :whole] = keep_in_rows(rows[:, :whole].reshape(-1, m), n).reshape(len(rows), whole)
    keep[:, whole:] = keep_in_rows(rows[:, whole:], n)
    return keep.reshape(scores.shape)


def checked_mask(mask: npt.ArrayLike, shape: tuple[int, ...]) -> Mask:
    """``mask`` as an array; ValueError unless it is of bool and of that shape."""
    keep = np.asarray(mask)
    if keep.shape != shape or keep.dtype != np.bool_:
        raise ValueError(f"mask must be a bool array of shape {shape}, got {keep.dtype} of {keep.shape}.")
    return keep


def parse_pattern(pattern: str) -> tuple[int, int]:
    """The two numbers of a pattern such as "2:4"."""
    n, colon, m = pattern.partition(":") if isinstance(pattern, str) else ("", "", "")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise ValueError(f'pattern must be like "2:4", n of every m inputs with 0 < n < m, got {pattern!r}.')
    return int(n), int(m)


def count_left(share: float, size: int) -> int:
    """Number of ``size`` weights that are kept when ⌊share · size⌋ are removed."""
    # A share such as 0.29 of 100 is 28.999… in binary.
    return size - int(np.floor(share * size + 1e-9))


def lamp_scores(sizes: npt.ArrayLike) -> Array:
    """w_i² / Σ_{j ≥ i} w_j²  of weights in ascending order of size.

    The share that this weight has in the squares of those not smaller. That of the largest is 1, so that of
    every layer that is not all zeros one weight is kept longer than anything else.

    From |w|, ascending; never descends, and is 0 for zeros.

    References
    ----------
    J. Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, 2021.
    """
    size = np.asarray(sizes, dtype=np.float64)
    # Squares of very small or large weights would be 0 or infinite.
    squares = np.square(size / (size.max(initial=0.0) or 1.0))
    left = np.cumsum(squares[::-1])[::-1]
    return np.asarray(np.divide(squares, left, out=np.zeros_like(squares), where=left > 0))


def lamp_shares(weights: Mapping[str, AnyArray], amount: float) -> dict[str, float]:
    """Share of each layer's weights to remove when ``amount`` of all are, those of the lowest scores."""
    scores = {name: lamp_scores(np.sort(np.abs(w), axis=None)) for name, w in weights.items()}
    together = np.concatenate([np.zeros(0), *scores.values()])
    removed = int(amount * together.size)
    if not removed:
        return dict.fromkeys(weights, 0.0)
    limit = np.partition(together, removed - 1)[removed - 1]
    return {
        name: float(np.searchsorted(score, limit, side="right")) / max(1, score.size)
        for name, score in scores.items()
    }


def _left(scores: Scores, share: float) -> Mask:
    return keep_largest(scores, count_left(share, scores.size))


def _rows_left(scores: Scores, share: float) -> Mask:
    """The share of every row; what ⌊⌋ leaves over is removed where scores are smallest."""
    if not scores.size:
        return np.ones(scores.shape, bool)
    rows = scores.reshape(len(scores), -1)
    count = count_left(share, rows.size)
    each = count // len(rows)
    keep = keep_in_rows(rows, each)
    more = keep_in_rows(rows, each + 1) & ~keep
    keep |= keep_largest(np.where(more, rows, -1.0), count - each * len(rows))
    return keep.reshape(scores.shape)


def _together(scored: Mapping[str, Scores], share: float, *, wanda: bool) -> dict[str, Mask]:
    if wanda:
        # Squares of very small or large scores would be 0 or infinite; powers of two change no other bit.
        scored = {name: np.ldexp(s, -np.frexp(s.max(initial=0.0))[1]) for name, s in scored.items()}
        scored = {name: score / (np.linalg.norm(score) or 1.0) for name, score in scored.items()}
    together = np.concatenate([np.zeros(0), *(score.ravel() for score in scored.values())])
    ends = np.cumsum([score.size for score in scored.values()])
    parts = np.split(_left(together, share), ends[:-1])
    return {name: part.reshape(scored[name].shape) for name, part in zip(scored, parts, strict=True)}


def _scores(w: Scores, method: str, moments: Scores | None, rng: np.random.Generator) -> Scores:
    if method == "random":
        return rng.random(w.shape)
    size = np.abs(w)
    if method == "std":
        # Weights that are all alike have no deviation; each of them lies infinitely many away from 0.
        deviation = float(np.std(w, dtype=np.float64)) if w.size else 1.0
        return size / deviation if deviation > 0 else np.where(size > 0, np.inf, 0.0)
    if moments is None:
        return size
    return np.asarray(size * np.sqrt(moments).reshape(w.shape[1:]))


def _moments(weights: Weights, given: Mapping[str, npt.ArrayLike] | None) -> dict[str, Scores]:
    if given is None or (missing := set(weights) - set(given)):
        which = "" if given is None else f"; {sorted(missing)} have none"
        raise ValueError(f'method="wanda" needs second_moments, E[x²] of the inputs of every layer{which}.')
    moments = {name: np.asarray(given[name], dtype=np.float64) for name in weights}
    for name, w in weights.items():
        inputs = int(np.prod(w.shape[1:]))
        if moments[name].shape != (inputs,) or not (moments[name] >= 0).all():
            raise ValueError(
                f"second_moments of {name} must be {inputs} numbers of at least 0, one an input, got an "
                f"array of shape {moments[name].shape}."
            )
    return moments


def _check(
    weights: Weights,
    method: str,
    scope: str,
    amount: PerLayer | None,
    threshold: PerLayer | None,
    sensitivity: PerLayer | None,
    pattern: str | None,
) -> None:
    one_of("method", method, METHODS)
    one_of("scope", scope, SCOPES)
    name = exactly_one(amount=amount, threshold=threshold, sensitivity=sensitivity, pattern=pattern)
    wanted = {"threshold": "magnitude", "sensitivity": "std"}.get(name, method)
    if method != wanted:
        raise ValueError(f"{name} goes with method={wanted!r}, got method={method!r}.")
    if scope == "global" and (pattern is not None or isinstance(amount, Mapping)):
        got = "a pattern" if pattern is not None else "one for each"
        raise ValueError(f"scope='global' takes one amount for all layers together, got {got}.")
    if pattern is not None:
        parse_pattern(pattern)
    for value in (amount, threshold, sensitivity):
        if value is not None:
            _check_numbers(weights, name, value)


def _check_numbers(weights: Weights, what: str, value: PerLayer) -> None:
    for name, number in (value if isinstance(value, Mapping) else {"": value}).items():
        top, allowed = (1, "in [0, 1)") if what == "amount" else (np.inf, "a finite number of at least 0")
        real = isinstance(number, int | float | np.number) and not isinstance(number, bool)
        if not (real and 0 <= number < top):
            raise ValueError(f"{what}{' of ' * bool(name)}{name} must be {allowed}, got {number}.")
    if isinstance(value, Mapping) and (unknown := set(value) - set(weights)):
        raise ValueError(f"{what} names {sorted(unknown)}; layers with weights: {', '.join(weights)}.")
