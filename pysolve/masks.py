"""Which weights of a network stay: unstructured pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Weights = Mapping[str, npt.NDArray[Any]]

METHODS = ("magnitude", "random")
SCOPES = ("local", "global")


def masks(
    weights: Weights,
    amount: float | Mapping[str, float],
    *,
    method: str = "magnitude",
    scope: str = "local",
    seed: int = 0,
) -> dict[str, Mask]:
    """Keep the weights with the largest scores: |w|, or a random number.

    Parameters
    ----------
    weights : {layer: array}
    amount : float or {layer: float}
        Share of the weights that goes, in [0, 1); with a mapping, layers without an entry keep all.
    method : "magnitude" or "random"
    scope : "local" or "global"
        The share of each layer, or of all together.
    seed : int
        Of random scores.

    Returns
    -------
    {layer: bool array}
        True for what stays. Exactly ⌊share · size⌋ weights go; zeros count as weights, and of equal ones the
        first stay.
    """
    _check(weights, amount, method, scope)
    rng = np.random.default_rng(seed)
    scores = {
        name: np.abs(w) if method == "magnitude" else rng.random(w.shape) for name, w in weights.items()
    }
    if scope == "local":
        shares = amount if isinstance(amount, Mapping) else dict.fromkeys(weights, amount)
        return {name: _largest(score, shares.get(name, 0.0)) for name, score in scores.items()}
    assert not isinstance(amount, Mapping)
    together = np.concatenate([np.zeros(0), *(score.ravel() for score in scores.values())])
    ends = np.cumsum([score.size for score in scores.values()])
    parts = np.split(_largest(together, amount), ends[:-1])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def _largest(scores: npt.NDArray[Any], share: float) -> Mask:
    """All but the smallest ⌊share · size⌋."""
    # A share such as 0.29 of 100 is 28.999… in binary.
    gone = int(np.floor(share * scores.size + 1e-9))
    keep = np.ones(scores.size, bool)
    keep[np.argsort(-scores.ravel(), kind="stable")[scores.size - gone :]] = False
    return keep.reshape(scores.shape)


def _check(weights: Weights, amount: float | Mapping[str, float], method: str, scope: str) -> None:
    for what, given, known in (("method", method, METHODS), ("scope", scope, SCOPES)):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; choose one of {', '.join(known)}.")
    each = amount if isinstance(amount, Mapping) else {"": amount}
    for name, share in each.items():
        if not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(f"amount{' of ' * bool(name)}{name} must be in [0, 1), got {share}.")
    if isinstance(amount, Mapping):
        if scope == "global":
            raise ValueError("scope='global' takes one amount for all layers together, got one for each.")
        if unknown := set(amount) - set(weights):
            raise ValueError(f"amount names {sorted(unknown)}; layers with weights: {', '.join(weights)}.")
