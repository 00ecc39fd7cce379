"""Values of a network's graph in the original and the compressed network, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from pysolve.nn.export import Graph


class Walk:
    """Values of the nodes that are still needed, a list of one a batch, in both networks.

    As long as nothing differs, the two share their values; every operator then runs once.

    Parameters
    ----------
    graph : Graph
        Of ``model``.
    model : nn.Module
    batches : sequence of batches
    values : {state-dict name: tensor}
        Parameters and buffers of the compressed network that differ from the original's; grows on the way.
    """

    def __init__(
        self, graph: Graph, model: nn.Module, batches: Sequence[Any], values: Mapping[str, Tensor]
    ) -> None:
        state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        self.graph, self.values = graph, dict(values)
        self.fixed: dict[Node, Any] = {node: state[name].detach() for node, name in graph.parameters.items()}
        self.fixed.update(graph.constants)
        self.added: dict[Node, Tensor] = {}
        self.batches = range(len(batches))
        bound = [graph.bind(batch) for batch in batches]
        self.wide: dict[Node, list[Any]] = {node: [one[node] for one in bound] for node in graph.inputs}
        self.slim = dict(self.wide)

    def run_original(self, node: Node) -> None:
        """The operator's results in the original network."""
        self.wide[node] = [self._run(node, self._of_original(b)) for b in self.batches]

    def run_compressed(self, node: Node) -> None:
        """The operator's results in the compressed network, after ``run_original``."""
        if node in self.added or any(map(self.differs, node.all_input_nodes)):
            added = self.added.get(node, 0)
            self.slim[node] = [self._run(node, self._of_compressed(b)) for b in self.batches]
            if node in self.added:
                self.slim[node] = [result + added for result in self.slim[node]]
        else:
            self.slim[node] = self.wide[node]
        if _in_place(node):
            # Whoever reads the operand from here on sees what was done to it.
            operand = node.all_input_nodes[0]
            self.wide[operand], self.slim[operand] = self.wide[node], self.slim[node]

    def differs(self, node: Node) -> bool:
        """Whether a value is not the same in the two networks."""
        if node in self.fixed:
            return self.graph.parameters.get(node) in self.values
        return self.slim[node] is not self.wide[node]

    def forget(self, nodes: Sequence[Node]) -> None:
        """Free values that nothing needs any more."""
        for node in nodes:
            self.wide.pop(node, None)
            self.slim.pop(node, None)

    def _of_original(self, b: int) -> Callable[[Node], Any]:
        return lambda node: self.fixed[node] if node in self.fixed else self.wide[node][b]

    def _of_compressed(self, b: int) -> Callable[[Node], Any]:
        def value(node: Node) -> Any:
            if node in self.fixed:
                return self.values.get(self.graph.parameters.get(node, ""), self.fixed[node])
            return self.slim[node][b]

        return value

    def _run(self, node: Node, value: Callable[[Node], Any]) -> Any:
        if node.op == "get_attr":
            return getattr(self.graph.module, str(node.target))
        assert callable(node.target)
        args, kwargs = map_arg((node.args, node.kwargs), value)
        if _in_place(node):
            # The two networks may share the operand.
            args = (cast(Tensor, args[0]).clone(), *args[1:])
        return node.target(*args, **kwargs)


def last_uses(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    """For each node, those that nothing needs once it has run."""
    last = {node: node for node in nodes}
    for node in nodes:
        for read in node.all_input_nodes:
            last[read] = node
    finished: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node, user in last.items():
        finished[user].append(node)
    return finished


def _in_place(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable)
