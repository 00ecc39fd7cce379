"""What branches that are gone added to a stream, for the layer in front of them to make up for.

Of  x + f(x) + g(x + f(x))  without g, the last layer of f has  f + g  for its target: the part of g that is
linear in what this layer reads is merged into its weight, where it is most of g. Between the two sums
nothing else may read the stream.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from torch import Tensor
from torch.fx import Node

from pysolve.correlations import Correlations
from pysolve.nn.graph.branches import Layer, idle_nodes, is_same
from pysolve.nn.graph.export import Graph, is_in_place
from pysolve.nn.refit.walk import Walk
from pysolve.solve.least_squares import refit

# Share of what went that must be linear in what the layer in front reads. Of branches of a decoder 23 to 45 %
# are, and merged they raise the divergence by up to 5 %: layers behind make up for more of them. Of a random
# perceptron's blocks 92 to 98 % are: merged, a fifth of the divergence is left.
MERGED = 0.8


def sums_beyond(
    graph: Graph, layers: Mapping[Node, Layer], gone: Collection[Node]
) -> dict[Node, tuple[Node, Node]]:
    """By nodes of layers, their sum or they themselves, and the last sum behind that only adds what is gone.

    Parameters
    ----------
    graph : Graph
    layers : {node: Layer}
    gone : collection of Node
        Of the last layers of these branches.
    """
    idle = idle_nodes(graph, gone)
    after = {layers[node].sum: layers[node].shortcut for node in gone}
    found: dict[Node, tuple[Node, Node]] = {}
    for node, layer in layers.items():
        # The first layer of a stream is added to nothing.
        total = last = layer.sum or node
        if node in gone or total.meta["val"].shape != node.meta["val"].shape:
            continue
        while (later := _next(last, after, idle)) is not None:
            found[node] = total, later
            last = later
    order = {one: place for place, one in enumerate(graph.module.graph.nodes)}
    writes = [order[one] for one in order if is_in_place(one)]
    # What is written in place on the way would be seen too early.
    return {
        node: (total, last)
        for node, (total, last) in found.items()
        if not any(order[node] < place <= order[last] for place in writes)
    }


def what_went(
    walk: Walk, nodes: Sequence[Node], total: Node, last: Node, finished: Mapping[Node, Sequence[Node]]
) -> list[Tensor]:
    """What the original adds between two sums, batch by batch; the walk itself stays where it is.

    Parameters
    ----------
    walk : Walk
    nodes : sequence of Node
        That run next, in order.
    total, last : Node
    finished : {node: nodes}
        Those that nothing needs once it has run.
    """
    ahead, before = walk.branch({}), walk.original.get(total, [])
    for node in nodes[: nodes.index(last) + 1]:
        ahead.run_original(node)
        if node is total:
            before = ahead.original[node]
        if node is not last:
            ahead.forget(finished[node])
    return [b - a for a, b in zip(before, ahead.original[last], strict=True)]


def is_linear(known: Correlations) -> bool:
    """Whether most of what went is linear in what a layer reads, by the correlations of the two."""
    h, d = known.yx.shape
    *_, lost = refit(known, np.arange(d), np.zeros((h, d)))
    return lost < 1 - MERGED


def _next(total: Node, after: Mapping[Node | None, Node | None], idle: Collection[Node]) -> Node | None:
    """The only sum that needs a sum, if what it adds is gone."""
    same, waiting = {total}, [total]
    live = set[Node]()
    while waiting:
        for user in waiting.pop().users:
            if is_same(user) and user not in idle:
                same.add(user)
                waiting.append(user)
            elif user not in idle:
                live.add(user)
    (only,) = live if len(live) == 1 else (None,)
    return only if only is not None and after.get(only) in same else None
