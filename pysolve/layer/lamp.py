"""Which share of each layer's weights goes when a share of all together is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pysolve.correlations import Array


def lamp_scores(sizes: npt.ArrayLike) -> Array:
    """w_i² / Σ_{j ≥ i} w_j²  of weights in ascending order of size.

    Of what a layer would still hold, the part that goes with this weight. The largest has 1, so that of
    every layer that is not all zeros one weight is kept longer than anything else.

    Parameters
    ----------
    sizes : (n,) array
        |w|, ascending.

    Returns
    -------
    (n,) array
        Not descending; of zeros, 0.

    References
    ----------
    J. Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, 2021.
    """
    size = np.asarray(sizes, dtype=np.float64)
    # Squares of very small or large weights would be 0 or infinite.
    squares = np.square(size / (size.max(initial=0.0) or 1.0))
    left = np.cumsum(squares[::-1])[::-1]
    return np.asarray(np.divide(squares, left, out=np.zeros_like(squares), where=left > 0))


def lamp_shares(weights: Mapping[str, npt.NDArray[Any]], amount: float) -> dict[str, float]:
    """Share of each layer's weights that goes when ``amount`` of all go, those of the lowest scores.

    Parameters
    ----------
    weights : {layer: array}
    amount : float
        In [0, 1).
    """
    scores = {name: lamp_scores(np.sort(np.abs(w), axis=None)) for name, w in weights.items()}
    together = np.concatenate([np.zeros(0), *scores.values()])
    gone = int(amount * together.size)
    if not gone:
        return dict.fromkeys(weights, 0.0)
    limit = np.partition(together, gone - 1)[gone - 1]
    return {
        name: float(np.searchsorted(score, limit, side="right")) / max(1, score.size)
        for name, score in scores.items()
    }
