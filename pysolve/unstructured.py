"""Pruning single weights: which stay, and whether a layer runs faster for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from pysolve.checks import check_model
from pysolve.compressed import Compressed, after
from pysolve.layout import LAYOUTS, laid_out
from pysolve.masks import masks
from pysolve.nn.network import as_array, find_matching
from pysolve.nn.slicing import WEIGHTED


def prune(
    model: nn.Module | Compressed,
    batches: Iterable[Any] | None = None,
    *,
    method: str = "magnitude",
    amount: float | Mapping[str, float],
    scope: str = "local",
    layout: str = "auto",
    ignore: Sequence[str] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
) -> Compressed:
    """Set single weights to zero, and run a layer as a sparse one where that is faster and smaller.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed. Weights of its Linear layers and convolutions are pruned; biases are not.
    batches : iterable of batches, optional
        As ``compress`` takes them; layers are timed on the first one, and the report's divergence is on it.
    method : "magnitude" or "random"
        What a weight is judged by.
    amount : float or {layer: float}
        Share of the weights that goes; with a mapping, layers without an entry keep all.
    scope : "local" or "global"
        The share of each layer, or of all together.
    layout : "auto", "dense", "csr" or "mask"
        "dense": zeros are stored and multiplied. "csr": each Linear and Conv2d becomes a ``SparseLinear``
        or ``SparseConv2d``. "auto": only where that takes fewer bytes and, on the first batch, at most nine
        tenths of the dense layer's time; without batches none does. "mask": dense layers whose zeros
        stay zero in training (``mask_weights``; ``remove_masks`` makes them ordinary ones).
    ignore : sequence of str
        Layers to leave alone: names, or patterns as ``re:…``.
    evaluate : callable, optional
        From a network to a score, for the report.
    seed : int
        Of random scores.

    Returns
    -------
    Compressed
        Its report says for each layer how it runs, and why.
    """
    original = model.model if isinstance(model, Compressed) else model
    check_model(original)
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    layers = dict(_layers(original, ignore))
    weights = {name: as_array(layer.weight) for name, layer in layers.items()}
    kept = masks(weights, amount, method=method, scope=scope, seed=seed)
    pruned = {name: np.where(kept[name], weight, 0).astype(weight.dtype) for name, weight in weights.items()}
    first = next(iter(batches), None) if batches is not None else None
    return after(model, laid_out(original, pruned, {}, layout, first, evaluate=evaluate, seed=seed))


def _layers(model: nn.Module, ignore: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Layers whose weights can be pruned, by name."""
    ignored = find_matching(model, ignore)
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED) and name not in ignored:
            yield name, module
