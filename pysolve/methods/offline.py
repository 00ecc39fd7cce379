"""Layers refitted from the original's correlations alone, each as if the others stayed as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from pysolve.correlations import Array, Correlations, group_columns
from pysolve.nn.graph.branches import Cut, Layer, layer_values
from pysolve.nn.layer_matrix import channels, matrix, taps
from pysolve.plan import Indices, Site
from pysolve.solve.least_squares import refit


def cuts_of(sites: Sequence[Site], kept: Sequence[Indices], layers: Mapping[str, Layer]) -> dict[str, Cut]:
    """What stays of the inputs and outputs of every layer that reads or writes one of the sites.

    Parameters
    ----------
    sites : sequence of Site
    kept : sequence of (k,) int arrays
        Channels that stay, of each site.
    layers : {name: Layer}
        Writers that are not among them (embeddings) have no cut.
    """
    lost: dict[tuple[str, int], list[Indices]] = {}
    for site, keep in zip(sites, kept, strict=True):
        gone = np.setdiff1d(np.arange(site.channels), keep)
        for name in (*site.readers, *site.writers):
            if name in layers:
                inputs, outputs = channels(layers[name].module)
                if name in site.readers:
                    lost.setdefault((name, 0), []).append(site.columns_of(name, inputs)[gone].ravel())
                if name in site.writers:
                    lost.setdefault((name, 1), []).append(site.rows_of(name, outputs)[gone].ravel())

    def left(name: str, side: int) -> Indices:
        everything = np.arange(channels(layers[name].module)[side])
        return np.setdiff1d(everything, np.concatenate(lost.get((name, side), [everything[:0]])))

    return {name: Cut(left(name, 0), left(name, 1)) for name in dict.fromkeys(name for name, _ in lost)}


def refit_readers(
    sites: Sequence[Site],
    kept: Sequence[Indices],
    layers: Mapping[str, Layer],
    correlations: Mapping[str, Correlations],
) -> dict[str, tuple[Array, Array | None]]:
    """New (h, d) weight, on the kept inputs and all outputs, and bias of every layer that reads the sites."""
    fits = {}
    for name, cut in cuts_of(sites, kept, layers).items():
        layer = layers[name]
        columns = group_columns(cut.inputs, taps(layer.module))
        if name in correlations and len(cut.inputs) < channels(layer.module)[0]:
            prior = matrix(layer.module).double().cpu().numpy()[:, columns]
            fits[name] = refit(correlations[name], columns, prior, intercept=layer.takes_bias)
    return fits


def reader_values(
    state: Mapping[str, Tensor],
    cuts: Mapping[str, Cut],
    layers: Mapping[str, Layer],
    fits: Mapping[str, tuple[Array, Array | None]],
) -> dict[str, Tensor]:
    """The refitted readers' parameters by their state-dict names, in the original's shapes."""
    values: dict[str, Tensor] = {}
    for name, (M, bias) in fits.items():
        whole = Cut(cuts[name].inputs, np.arange(len(M)))
        values |= layer_values(state, layers[name], whole, M, bias)
    return values
