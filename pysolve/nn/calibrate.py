"""One pass over the user's batches: samples to fit on, samples to measure on, correlations of layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import length_hint
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from pysolve.correlations import Correlations
from pysolve.errors import DataError
from pysolve.nn.calibration import Calibration, free_memory, hint, room_for, samples_in, traced_samples
from pysolve.nn.gather import gather
from pysolve.nn.graph.branches import Layer
from pysolve.nn.graph.export import Graph
from pysolve.nn.layer_matrix import channels, taps

# Rows (samples × positions) to gather for a layer, as a multiple of its inputs.
ROWS_PER_INPUT = 60


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    first: Any,
    graph: Graph | None,
    nodes: Mapping[Node, Layer],
    layers: Sequence[str],
    *,
    memory: int | None = None,
    progress: bool = True,
) -> tuple[Calibration, dict[str, Correlations]]:
    """Share the batches out, and gather the correlations of some layers on the way.

    Parameters
    ----------
    model : nn.Module
    batches, first
        What ``peek`` gave.
    graph : Graph, optional
        For how many samples there is memory; without it, a batch's are kept.
    nodes : {Node: Layer}
        Of the graph.
    layers : sequence of str
        Whose correlations to gather; without any, the network does not run.
    memory : int, optional
        Bytes that samples may take when they walk through the graph; by default half of what is free.
    progress : bool
    """
    limit = room_for(graph, free_memory() if memory is None else memory) if graph else samples_in(first)
    calibration = Calibration(limit)
    stream = calibration.stream(batches)
    if not layers:
        for _ in stream:
            pass
        return calibration, {}
    # Of how many batches an iterator has, ten is as good a guess as any.
    total = samples_in(first) * length_hint(batches, 10)
    shares = _shares(graph, nodes, layers, total) if graph else dict.fromkeys(layers, 1.0)
    return calibration, gather(model, stream, layers=layers, positions=shares, progress=progress)


def peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and all of them."""
    if isinstance(batches, Tensor | Mapping):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, got one {kind}: wrap it in a list.")
    if isinstance(batches, Sequence):
        if not batches:
            raise DataError("there are no batches: expected at least one.")
        return batches[0], batches
    iterator = iter(batches)
    for first in iterator:
        # An iterator is used up by looking at it; a loader begins again.
        return first, chain([first], iterator) if iterator is batches else batches
    raise DataError("there are no batches: expected at least one. Was a generator used up before?")


def _shares(
    graph: Graph, nodes: Mapping[Node, Layer], readers: Sequence[str], samples: int
) -> dict[str, float]:
    """Which part of its positions each layer is to be gathered over."""
    shares, traced = dict.fromkeys(readers, 1.0), traced_samples(graph)
    for node, layer in nodes.items():
        if layer.name in shares:
            inputs, outputs = channels(layer.module)
            rows = hint(node.meta["val"].numel()) / outputs / traced * samples
            shares[layer.name] = min(1.0, ROWS_PER_INPUT * inputs * taps(layer.module) / rows)
    return shares
