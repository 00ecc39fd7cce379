"""Outputs of a network with some of its parameters changed, from the first operator on that reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import Node

from pysolve.correlations import Indices
from pysolve.nn.graph.export import Graph
from pysolve.nn.outputs import with_tensors
from pysolve.nn.refit.walk import Walk, draws, last_uses
from pysolve.nn.running import Batch, Output


def is_repeatable(graph: Graph) -> bool:
    """Whether no operator draws random numbers: graph and network then give the same outputs."""
    return not any(map(draws, graph.module.graph.nodes))


def changed_outputs(
    graph: Graph,
    model: nn.Module,
    batches: Sequence[Batch],
    outputs: Sequence[Output],
    names: Sequence[Collection[str]],
    values: Callable[[int], Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor],
    norms: Callable[[int], Mapping[str, Indices]] = lambda number: {},
) -> Iterator[tuple[int, Iterator[Output]]]:
    """Outputs of a network for several changes, each by itself.

    One walk through the original; each change branches off where it is first read. Cost: one pass, and for
    each change what follows it.

    Parameters
    ----------
    graph : Graph
        Of ``model``.
    outputs : sequence of outputs
        Of the network without a change, one for each batch.
    names : sequence of collections of str
        For each change the state-dict names of what it changes, all of them parameters of the graph.
    values : callable
        From the number of a change to its new values.
    base : {state-dict name: tensor}
        Parameters of the network without a change, where they are not the model's.
    norms : callable
        From the number of a change to the channels that stay of layer norms, by their weights' names, which
        are among ``names``.

    Yields
    ------
    int, outputs
        The number of a change and its outputs, one for each batch, in the order in which the network reads
        what is changed.
    """
    nodes = [*graph.module.graph.nodes]
    places = {node: place for place, node in enumerate(nodes)}
    users = {name: list(node.users) for node, name in graph.parameters.items()}
    starts = [
        min((places[user] for name in own for user in users[name]), default=len(nodes) - 1) for own in names
    ]
    waiting = sorted(range(len(names)), key=starts.__getitem__)
    walk, finished = Walk(graph, model, batches, {}).branch(base), last_uses(nodes)
    for place, node in enumerate(nodes):
        while waiting and starts[waiting[0]] == place:
            number = waiting.pop(0)
            branch = walk.branch(values(number), norms(number))
            # Inside the loop: a generator that is abandoned must not leave gradients switched off.
            with torch.no_grad():
                found = _run(branch, nodes[place:], finished)
            yield number, map(with_tensors, outputs, found)
        if not waiting:
            return
        with torch.no_grad():
            _step(walk, node, finished)


def _run(walk: Walk, nodes: Sequence[Node], finished: Mapping[Node, Sequence[Node]]) -> list[list[Tensor]]:
    """The tensors that the rest of the operators give, batch by batch."""
    for node in nodes[:-1]:
        _step(walk, node, finished)
    given = nodes[-1].args[0]
    return [[walk.value(node, b) for node in given] for b in walk.batches]  # type: ignore[union-attr, arg-type]


def _step(walk: Walk, node: Node, finished: Mapping[Node, Sequence[Node]]) -> None:
    if node.op not in ("placeholder", "output"):
        walk.run_original(node)
        walk.run_compressed(node)
    walk.forget(finished[node])
