"""Scores of whole channels, beside elimination and the lasso: norms, activations, propagated importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from pysolve.correlations import Array, Indices, group_columns
from pysolve.layer.scores import channel_norms
from pysolve.methods.study import Study
from pysolve.nn.cut.bare import Stack, find_member, is_stack
from pysolve.nn.cut.slicing import inputs
from pysolve.nn.layer_matrix import LAYERS, groups, matrix, taps
from pysolve.nn.running import as_array
from pysolve.plan import Site

SCORES: tuple[str, ...] = ("ln", "activation", "nisp")


def scores_of(study: Study, method: str, norm: float = 2) -> dict[Site, Array]:
    """Scores of the channels of every site that can shrink; the larger ones matter."""
    if method == "activation":
        return activations(study)
    if method == "ln":
        return norms(study.model, study.free, norm)
    found = importances(study.model, [site for site in study.sites if site.router is None])
    return {site: found[site] for site in study.free}


def keep_by_share(scores: Mapping[Site, Array], amount: float) -> dict[str | Site, float]:
    """How many channels stay where a share of all together is removed, the lowest scores first.

    Sites differ in scale: each score counts as a share of its site's mean. One channel of each stays.
    """
    shares = {site: own / (np.mean(np.abs(own)) or 1.0) for site, own in scores.items()}
    together = np.concatenate([*shares.values()])
    gone = round(amount * len(together))
    limit = np.sort(together)[gone] if gone < len(together) else np.inf
    return {site: max(1, int((own >= limit).sum())) for site, own in shares.items()}


def keep_above(
    scores: Mapping[Site, Array], threshold: float | Mapping[str, float]
) -> dict[str | Site, float]:
    """How many channels reach a threshold, at least one a site; all where a mapping has no writer of it."""
    found: dict[str | Site, float] = {}
    for site, own in scores.items():
        limit = threshold
        if isinstance(limit, Mapping):
            limit = next((limit[name] for name in site.writers if name in limit), -np.inf)
        found[site] = max(1, int((own >= limit).sum()))
    return found


def norms(model: nn.Module, sites: Sequence[Site], n: float = 2) -> dict[Site, Array]:
    """‖w_c‖_n of what writes each channel; over several writers, the norm of all."""
    found = {}
    for site in sites:
        parts = [channel_norms(rows.reshape(site.channels, -1), n=n) for rows in _written(model, site)]
        found[site] = channel_norms(np.stack(parts, 1), n=n)
    return found


def activations(study: Study) -> dict[Site, Array]:
    """E[x_c], the mean of what is read of each channel, over its readers, positions and samples.

    Of matrices in one parameter, whose means are not gathered, the root of the mean square.
    """
    found = {}
    for site in study.free:
        means = []
        for name in dict.fromkeys(site.readers):
            own = study.correlations.get(name)
            if own is None:
                continue
            mean = np.sqrt(np.diag(own.r_xx)) if is_stack(name) else own.x_sum / own.count
            means.append(mean[_columns(study.model, site, name)].mean(1))
        found[site] = np.asarray(np.mean(means, axis=0))
    return found


def importances(model: nn.Module, sites: Sequence[Site]) -> dict[Site, Array]:
    """Importance of each channel for the network's outputs, propagated back from the last layer.

    s_c = Σ_r Σ_o |W_r[o, c]| s_o over the readers r of the channel and their outputs o, whose importance is 1
    at the end. In a plain chain that is ``propagated_importance``; around a residual stream, the stream's own
    importance counts as 1 for what is written back to it.
    """
    found: dict[Site, Array] = {}
    written: dict[str, list[tuple[Site, Indices]]] = {}
    for site in sites:
        for name in site.writers:
            M = _matrix(model, name)
            if M is not None:
                written.setdefault(name, []).append((site, site.rows_of(name, M.shape[-2])))
    for site in reversed(sites):
        total = np.zeros(site.channels)
        for name in dict.fromkeys(site.readers):
            M = _matrix(model, name)
            if M is None:
                continue
            outputs = np.ones(M.shape[-2])
            for other, rows in written.get(name, []):
                if other in found:
                    outputs[rows] = found[other][:, None]
            read = outputs @ np.abs(M).reshape(-1, *M.shape[-2:]).sum(0)
            total += read[_columns(model, site, name)].sum(1)
        # Outputs of the network are read by nothing.
        found[site] = total if site.readers else np.ones(site.channels)
    return found


def _columns(model: nn.Module, site: Site, name: str) -> Indices:
    """(channels, c·taps) columns of a reader's matrix that belong to each channel."""
    layer = find_member(model, name)
    assert isinstance(layer, (Stack, *LAYERS))
    each = 1 if isinstance(layer, Stack) else taps(layer)
    table = site.columns_of(name, inputs(layer))
    return np.asarray(group_columns(table.ravel(), each).reshape(site.channels, -1), dtype=np.intp)


def _written(model: nn.Module, site: Site) -> list[Array]:
    """Of each writer, the part of its weight that makes each channel, (channels, …)."""
    found = []
    for name in dict.fromkeys(site.writers):
        layer = find_member(model, name)
        M = as_array(layer.weight.T).astype(np.float64) if isinstance(layer, nn.Embedding) else None
        M = _matrix(model, name) if M is None else M
        if M is not None:
            found.append(np.moveaxis(M, -2, 0)[site.rows_of(name, M.shape[-2])])
    return found


def _matrix(model: nn.Module, name: str) -> Array | None:
    """(outputs, inputs) of a layer, or (…, outputs, inputs) of matrices in one parameter; else None."""
    layer = find_member(model, name)
    if isinstance(layer, Stack):
        return as_array(layer.matrices).astype(np.float64)
    if not isinstance(layer, LAYERS) or groups(layer) > 1:
        return None
    return as_array(matrix(layer)).astype(np.float64)
