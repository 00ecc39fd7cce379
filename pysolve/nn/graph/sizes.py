"""Sizes of batches beside those that a graph was traced with."""

from __future__ import annotations

import torch
from torch import Tensor

from pysolve.nn.batches.samples import regrouped
from pysolve.nn.graph.export import Graph, admits
from pysolve.nn.running import Batch


def traced_samples(graph: Graph) -> int:
    """How many samples the batch had that the graph was traced with."""
    values = [node.meta.get("val") for i, node in enumerate(graph.inputs) if i not in graph.shared]
    return next((hint(v.shape[0]) for v in values if isinstance(v, Tensor) and v.ndim), 1)


def fits(graph: Graph, batch: Batch) -> bool:
    """Whether a batch has the sizes that the network's code has fixed in its graph."""
    return all(
        value.ndim == len(node.meta["val"].shape) and all(map(admits, node.meta["val"].shape, value.shape))
        for node, value in graph.bind(batch).items()
        if isinstance(value, Tensor)
    )


def of_other_sizes(graph: Graph, batch: Batch) -> bool:
    """Whether a batch has other sizes than the example that was traced, beside the number of samples."""
    pairs = [(v, node.meta["val"]) for node, v in graph.bind(batch).items() if isinstance(v, Tensor)]
    return any([*value.shape[1:]] != [*map(hint, traced.shape[1:])] for value, traced in pairs)


def usable(graph: Graph, batches: list[Batch]) -> list[Batch]:
    """Batches that can walk through the graph: as they are, or whole ones of the size that its code fixes."""
    if all(fits(graph, batch) for batch in batches):
        return batches
    return [batch for batch in regrouped(batches, traced_samples(graph)) if fits(graph, batch)]


def hint(size: int | torch.SymInt) -> int:
    """A size as the example had it; one that depends on values as if two rows had been chosen by them."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    known, formula = size.node.hint, size.node.expr
    return int(formula.subs(dict.fromkeys(formula.free_symbols, 2)) if known is None else known)
