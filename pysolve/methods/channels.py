"""Pruning whole channels by the scores of the field, beside elimination and the lasso."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from pysolve.compressed import Compressed
from pysolve.correlations import Array, group_columns
from pysolve.errors import PysolveError
from pysolve.layer.masks import PerLayer
from pysolve.layer.scores import channel_norms
from pysolve.methods.compress import compress
from pysolve.nn.calibration import peek
from pysolve.nn.gather import gather
from pysolve.nn.graph.sites import find_sites
from pysolve.nn.layer_matrix import LAYERS, channels, groups, matrix, taps
from pysolve.nn.running import as_array, find_layer
from pysolve.plan import Site

SCORES = ("ln", "activation", "nisp")
METHODS = (*SCORES, "elimination", "lasso")


def prune_channels(
    model: nn.Module | Compressed,
    batches: Iterable[Any],
    *,
    method: str,
    wanted: Mapping[str, Any],
    norm: float = 2,
    scope: str = "local",
    ignore: Sequence[str] = (),
    **options: Any,
) -> Compressed:
    """Remove whole channels, physically, through the same plan as ``compress``.

    Parameters
    ----------
    model, batches, method, norm, scope, ignore
        As ``pysolve.prune`` has them.
    wanted : {"amount", "threshold" or "target": value}
    options
        Further arguments of ``compress``.
    """
    network = model.model if isinstance(model, Compressed) else model
    first, batches = peek(batches)
    items = batches if hasattr(batches, "__len__") else list(batches)
    if method not in SCORES:
        goal = _goal(wanted)
        return compress(model, items, select=method, ignore=ignore, **goal, **options)
    sites = find_sites(network, first, ignore=ignore)
    free = [site for site in sites if site.pinned is None]
    if not free:
        return compress(model, items, ignore=ignore, **options)
    if method == "activation":
        scores = activations(network, items, free, progress=options.get("progress", True))
    else:
        scores = norms(network, free, norm) if method == "ln" else importances(network, sites)
    goal = _sizes(free, scores, wanted, scope)
    return compress(model, items, select=scores, sites=sites, **goal, **options)


def norms(model: nn.Module, sites: Sequence[Site], n: float = 2) -> dict[str, Array]:
    """‖w_c‖_n of what writes each channel, by the sites' names; over several writers, the norm of all."""
    found = {}
    for site in sites:
        parts = [channel_norms(rows.reshape(site.channels, -1), n=n) for rows in _written(model, site)]
        found[site.name] = channel_norms(np.stack(parts, 1), n=n)
    return found


def activations(
    model: nn.Module, batches: Iterable[Any], sites: Sequence[Site], *, progress: bool = True
) -> dict[str, Array]:
    """E[x_c], the mean of what is read of each channel, over its readers, positions and samples."""
    found = {}
    correlations = gather(model, batches, sites, progress=progress)
    for site in sites:
        means = []
        for name in dict.fromkeys(site.readers):
            own = correlations[name]
            mean, columns = own.x_sum / own.count, _columns(model, site, name)
            means.append(mean[columns].mean(1))
        found[site.name] = np.asarray(np.mean(means, axis=0))
    return found


def importances(model: nn.Module, sites: Sequence[Site]) -> dict[str, Array]:
    """Importance of each channel for the network's outputs, propagated back from the last layer.

    s_c = Σ_r Σ_o |W_r[o, c]| s_o over the readers r of the channel and their outputs o, whose importance is 1
    at the end. In a plain chain that is ``propagated_importance``; around a residual stream, the stream's own
    importance counts as 1 for what is written back to it.
    """
    found: dict[str, Array] = {}
    written: dict[str, list[tuple[Site, npt.NDArray[np.intp]]]] = {}
    for site in sites:
        for name in site.writers:
            layer = find_layer(model, name)
            if isinstance(layer, LAYERS):
                written.setdefault(name, []).append((site, site.rows_of(name, channels(layer)[1])))
    for site in reversed(sites):
        total = np.zeros(site.channels)
        for name in dict.fromkeys(site.readers):
            layer = find_layer(model, name)
            if not isinstance(layer, LAYERS) or groups(layer) > 1:
                continue
            outputs = np.ones(channels(layer)[1])
            for other, rows in written.get(name, []):
                if other.name in found:
                    outputs[rows] = found[other.name][:, None]
            read = outputs @ np.abs(as_array(matrix(layer)).astype(np.float64))
            total += read[_columns(model, site, name)].sum(1)
        # Outputs of the network are read by nothing.
        found[site.name] = total if site.readers else np.ones(site.channels)
    return found


def _columns(model: nn.Module, site: Site, name: str) -> npt.NDArray[np.intp]:
    """(channels, c·taps) columns of a reader's matrix that belong to each channel."""
    layer = find_layer(model, name)
    assert isinstance(layer, LAYERS)
    table = site.columns_of(name, channels(layer)[0])
    return np.asarray(group_columns(table.ravel(), taps(layer)).reshape(site.channels, -1), dtype=np.intp)


def _written(model: nn.Module, site: Site) -> list[Array]:
    """Of each writer, the part of its weight that makes each channel, (channels, …)."""
    found = []
    for name in dict.fromkeys(site.writers):
        layer = find_layer(model, name)
        weight = layer.weight.T if isinstance(layer, nn.Embedding) else None
        if weight is None and isinstance(layer, LAYERS):
            weight = matrix(layer)
        if weight is not None:
            M = as_array(weight).astype(np.float64)
            found.append(M[site.rows_of(name, len(M))])
    return found


def _goal(wanted: Mapping[str, Any]) -> dict[str, Any]:
    ((what, value),) = wanted.items()
    if what == "target":
        return {"target": value}
    if what != "amount":
        raise ValueError(f"elimination and the lasso take an amount or a target, got a {what}.")
    return {"keep": _kept(value)}


def _kept(amount: PerLayer) -> float | dict[str, float]:
    if isinstance(amount, Mapping):
        return {name: _share(share) for name, share in amount.items()}
    return _share(amount)


def _share(amount: Any) -> float:
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < 1:
        raise ValueError(f"amount must be in [0, 1), got {amount!r}.")
    return 1.0 - amount


def _sizes(
    sites: Sequence[Site], scores: Mapping[str, Array], wanted: Mapping[str, Any], scope: str
) -> dict[str, Any]:
    """What ``compress`` is asked for."""
    ((what, value),) = wanted.items()
    if what == "threshold":
        return {"keep": {site.writers[0]: _above(scores[site.name], site, value) for site in sites}}
    if what == "target" or scope == "local":
        return _goal(wanted)
    if isinstance(value, Mapping):
        raise ValueError("scope='global' takes one amount for all sites together, got one for each.")
    # Sites differ in scale: each score counts as a share of its site's mean.
    shares = [scores[site.name] / (np.mean(np.abs(scores[site.name])) or 1.0) for site in sites]
    together = np.concatenate(shares)
    gone = round((1.0 - _share(value)) * len(together))
    limit = np.sort(together)[gone] if gone < len(together) else np.inf
    left = [max(1, int((own >= limit).sum())) for own in shares]
    return {"keep": {site.writers[0]: count for site, count in zip(sites, left, strict=True)}}


def _above(scores: Array, site: Site, threshold: PerLayer) -> int:
    if isinstance(threshold, Mapping):
        given = [threshold[name] for name in site.writers if name in threshold]
        if not given:
            return site.channels
        threshold = given[0]
    if not np.isfinite(threshold):
        raise PysolveError(f"threshold must be a finite number, got {threshold}.")
    return max(1, int((scores >= threshold).sum()))
