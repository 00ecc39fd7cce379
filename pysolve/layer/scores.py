"""Scores of whole channels, from their weights or from the importance of what reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pysolve.correlations import Array


def channel_norms(weight: npt.ArrayLike, *, n: float = 2, axis: int = 0) -> Array:
    """‖w_c‖_n of every channel of a weight array.

    Parameters
    ----------
    weight : array
    n : float
        1, 2 or infinity, or any other positive number.
    axis : int
        The channels' axis: 0 for a layer's outputs, 1 for its inputs.

    Returns
    -------
    (channels,) array

    Raises
    ------
    ValueError
        When n is not positive.
    """
    if not n > 0:
        raise ValueError(f"n, the order of the norm, must be positive, got {n}.")
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
    convolution, positions after a flatten.

    Parameters
    ----------
    weights : sequence of (h_l, …) arrays
        In the order of the network; each layer's inputs, flattened, are h of the one before, times the
        same number for each channel.
    final : (h_last,) array, optional
        Importance of the network's outputs; 1 for all by default.

    Returns
    -------
    tuple of (h_l,) arrays
        One for each layer, the last one ``final``.

    Raises
    ------
    ValueError
        When the weights are no chain of layers, or ``final`` is not one number ≥ 0 an output.

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
    return tuple(reversed(found))


def _matrix(weight: npt.ArrayLike) -> Array:
    w = np.asarray(weight, dtype=np.float64)
    return w.reshape(len(w), int(np.prod(w.shape[1:])))
