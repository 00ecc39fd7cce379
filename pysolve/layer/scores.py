"""Scores of whole channels, from their weights or from the importance of what reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pysolve.correlations import Array


def channel_norms(weight: npt.ArrayLike, *, n: float = 2, axis: int = 0) -> Array:
    """‖w_c‖_n of every channel of a weight array, n > 0; axis 0 has a layer's outputs, 1 its inputs."""
    if not isinstance(n, int | float | np.number) or not n > 0:
        raise ValueError(f"n, the order of the norm, must be a positive number, got {n!r}.")
    w = np.moveaxis(np.asarray(weight, dtype=np.float64), axis, 0)
    w = np.abs(w.reshape(len(w), -1))
    peak = w.max(initial=0.0)
    if np.isinf(n) or peak == 0:
        return np.asarray(w.max(axis=1, initial=0.0))
    return np.asarray(peak * np.sum((w / peak) ** n, axis=1) ** (1 / n))


def propagated_importance(
    weights: Sequence[npt.ArrayLike], final: npt.ArrayLike | None = None
) -> tuple[Array, ...]:
    """Importance of every output channel of a chain of layers, from the last layer back.

    s_l = |W_{l+1}|ᵀ s_{l+1}, summed over the inputs of the next layer that belong to one channel: taps of a
    convolution, positions after a flatten. Weights (h_l, …) come in the order of the network, each with h of
    the one before times a whole number of inputs; ``final`` is the importance of the last outputs (1).

    References
    ----------
    R. Yu et al., NISP: Pruning networks using neuron importance score propagation, 2018.
    """
    matrices = [np.abs(_matrix(w)) for w in weights]
    if not matrices:
        raise ValueError("weights must hold at least one layer's, got none.")
    last = np.ones(len(matrices[-1])) if final is None else np.asarray(final, dtype=np.float64)
    if last.shape != (len(matrices[-1]),) or not (last >= 0).all():
        raise ValueError(
            f"final must be {len(matrices[-1])} numbers of at least 0, one an output, got {last.shape}."
        )
    found = [last]
    for own, following in zip(matrices[-2::-1], matrices[:0:-1], strict=True):
        inputs = following.shape[1]
        if not len(own) or inputs % len(own):
            raise ValueError(
                f"a layer of {len(own)} outputs is followed by one of {inputs} inputs, no multiple of them: "
                "weights must be a plain chain of layers, front to back."
            )
        found.append((found[-1] @ following).reshape(len(own), -1).sum(1))
    if not all(np.isfinite(importance).all() for importance in found):
        raise ValueError("the products of these weights are no finite numbers: scale the layers' weights.")
    return tuple(reversed(found))


def _matrix(weight: npt.ArrayLike) -> Array:
    w = np.asarray(weight, dtype=np.float64)
    return w.reshape(len(w), int(np.prod(w.shape[1:])))
