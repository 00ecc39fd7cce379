"""Values of a network's graph in the original and the compressed network, operator by operator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from types import MappingProxyType
from typing import cast
from zlib import crc32

import torch
from torch import Tensor, UntypedStorage, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from pysolve.correlations import Indices
from pysolve.nn.cut.norms import norm_nodes, norm_over
from pysolve.nn.cut.routers import never_chosen, router_nodes
from pysolve.nn.graph.export import Graph, Value, is_in_place
from pysolve.nn.overrides import Args, Function, Kwargs
from pysolve.nn.running import Batch

# What runs in the place of an operator, on its node, arguments and keyword arguments.
Other = Callable[[Node, Args, Kwargs], Value]


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
    norms : {weight: (k,) int array}
        Layer norms that the compressed network has over some channels alone, and experts among which its
        routers choose.
    """

    def __init__(
        self,
        graph: Graph,
        model: nn.Module,
        batches: Sequence[Batch],
        values: Mapping[str, Tensor],
        norms: Mapping[str, Indices] = MappingProxyType({}),
    ) -> None:
        state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        state |= dict(model.named_buffers(remove_duplicate=False))
        self.graph, self.values = graph, dict(values)
        self.fixed: dict[Node, Value] = dict(graph.constants)
        self.fixed |= {node: state[name].detach() for node, name in graph.parameters.items()}
        self.added: dict[Node, Tensor] = {}
        self.outlined = set[Node]()
        self.norms = _others(graph, norms)
        # Of a branch's original.
        self.changed: dict[Node, Other] = {}
        self.batches = range(len(batches))
        self.bound = [graph.bind(batch) for batch in batches]
        self.original: dict[Node, list[Value]] = {
            node: [one[node] for one in self.bound] for node in graph.inputs
        }
        self.compressed = dict(self.original)

    def branch(
        self, values: Mapping[str, Tensor], norms: Mapping[str, Indices] = MappingProxyType({})
    ) -> Walk:
        """A walk of its own from here on, in which the original has other parameters and norms."""
        other = copy(self)
        changed = {node: values[name] for node, name in self.graph.parameters.items() if name in values}
        other.fixed = {**self.fixed, **changed}
        other.values, other.added, other.norms = {}, {}, {}
        other.changed = _others(self.graph, norms)
        other.original, other.compressed = dict(self.original), dict(self.compressed)
        return other

    def onward(self, b: int, values: Mapping[str, Tensor]) -> Walk:
        """A walk of its own from here on, of one batch, whose original is the compressed network.

        ``values`` are parameters that it has in the place of those.
        """
        other, own = copy(self), {**self.values, **values}
        changed = {node: own[name] for node, name in self.graph.parameters.items() if name in own}
        other.fixed, other.changed = {**self.fixed, **changed}, self.norms
        other.values, other.added, other.norms, other.batches = {}, {}, {}, range(1)
        other.original = {node: [each[b]] for node, each in self.compressed.items()}
        other.compressed = dict(other.original)
        return other

    def again(self) -> Walk:
        """A walk of the same networks, from the inputs on."""
        other = copy(self)
        other.original = {node: [one[node] for one in self.bound] for node in self.graph.inputs}
        other.compressed = dict(other.original)
        return other

    def run_original(self, node: Node) -> None:
        """The operator's results in the original network."""
        with _draws(node):
            self.original[node] = [self._run(node, self._of_original(b), self.changed) for b in self.batches]

    def run_compressed(self, node: Node) -> None:
        """The operator's results in the compressed network, after ``run_original``."""
        if node in self.added or node in self.norms or any(map(self.differs, node.all_input_nodes)):
            added = self.added.get(node, 0)
            with _draws(node):
                self.compressed[node] = [
                    self._run(node, self._of_compressed(b), self.norms) for b in self.batches
                ]
            if node in self.added:
                self.compressed[node] = [result + added for result in self.compressed[node]]
        else:
            self.compressed[node] = self.original[node]
        if is_in_place(node):
            self._show_written(node)

    def outline(self, node: Node) -> None:
        """The shapes alone of a Linear layer's results in the original network."""
        read, weight = cast(tuple[Node, Node], node.args[:2])
        given = [cast(Tensor, self.original_value(read, b)) for b in self.batches]
        outputs = cast(Tensor, self.fixed[weight]).shape[0]
        self.original[node] = [x.new_zeros(()).expand(*x.shape[:-1], outputs) for x in given]
        self.outlined.add(node)

    def fill(self, node: Node) -> None:
        """The results of an operator of which there were only shapes."""
        if node in self.outlined:
            self.run_original(node)
            self.outlined.remove(node)

    def value(self, node: Node, b: int) -> Value:
        """A node's value in the compressed network for one batch, also that of a parameter or buffer."""
        return self._of_compressed(b)(node)

    def original_value(self, node: Node, b: int) -> Value:
        """The same in the original network."""
        return self._of_original(b)(node)

    def differs(self, node: Node) -> bool:
        """Whether a value is not the same in the two networks."""
        if node in self.original:
            return self.compressed[node] is not self.original[node]
        return self.graph.parameters.get(node) in self.values

    def forget(self, nodes: Sequence[Node]) -> None:
        """Free values that nothing needs any more."""
        for node in nodes:
            self.original.pop(node, None)
            self.compressed.pop(node, None)

    def _of_original(self, b: int) -> Callable[[Node], Value]:
        return lambda node: self.original[node][b] if node in self.original else self.fixed[node]

    def _of_compressed(self, b: int) -> Callable[[Node], Value]:
        def value(node: Node) -> Value:
            if node in self.compressed:
                return self.compressed[node][b]
            return self.values.get(self.graph.parameters.get(node, ""), self.fixed[node])

        return value

    def _show_written(self, node: Node) -> None:
        """Let all who read the operand of an in-place operator, or another view of it, see what it wrote."""
        operand = node.all_input_nodes[0]
        before = [[of(b)(operand) for b in self.batches] for of in (self._of_original, self._of_compressed)]
        seen: dict[tuple[int, int], list[Value]] = {}
        for side, old in zip((self.original, self.compressed), before, strict=True):
            new = side[node]
            for other, values in list(side.items()):
                # What the two networks shared stays shared if they wrote the same.
                key = (id(values), id(new))
                if other is not node and key not in seen:
                    written = [*map(_rewritten, values, old, new)]
                    seen[key] = values if all(map(operator.is_, values, written)) else written
                side[other] = seen.get(key, values)
            side[operand] = new

    def _run(self, node: Node, value: Callable[[Node], Value], norms: Mapping[Node, Other]) -> Value:
        if node.op == "get_attr":
            return getattr(self.graph.module, str(node.target))
        assert callable(node.target)
        args, kwargs = map_arg((node.args, node.kwargs), value)
        if is_in_place(node):
            # The two networks may share the operand, and other values may be views of it.
            operand = cast(Tensor, args[0]).detach()
            args = (_moved(operand, copy(operand.untyped_storage())), *args[1:])
        if node in norms:
            return norms[node](node, args, kwargs)
        return node.target(*args, **kwargs)


def _others(graph: Graph, kept: Mapping[str, Indices]) -> dict[Node, Other]:
    """Operators that norms over some channels run instead, and routers that choose among some experts."""

    def normed(node: Node, args: Args, kwargs: Kwargs, own: Tensor) -> Value:
        return norm_over(own, args)

    def routed(node: Node, args: Args, kwargs: Kwargs, own: Tensor, count: int) -> Value:
        return never_chosen(cast(Function, node.target)(*args, **kwargs), own, count)

    shapes = {name: node.meta["val"].shape for node, name in graph.parameters.items() if name in kept}
    norms = {name: one for name, one in kept.items() if len(shapes.get(name, ())) == 1}
    found: dict[Node, Other] = {
        node: partial(normed, own=own) for node, own in norm_nodes(graph, norms).items()
    }
    for name in kept.keys() & shapes.keys() - norms.keys():
        for node, own in router_nodes(graph, {name: kept[name]}).items():
            found[node] = partial(routed, own=own, count=shapes[name][0])
    return found


def unread(graph: Graph) -> set[Node]:
    """Linear layers that make the network's outputs alone, of no fewer outputs than inputs, as of words.

    They are refitted to what they read: no walk needs what they make.
    """
    *_, output = graph.module.graph.nodes
    linear = torch.ops.aten.linear.default
    made = [node for node in output.all_input_nodes if node.target is linear and [*node.users] == [output]]
    shapes = {node: node.args[1].meta["val"].shape for node in made if node.args[1] in graph.parameters}
    return {node for node, shape in shapes.items() if shape[0] >= shape[1]}


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


def end_of_numbers(walk: Walk, nodes: Sequence[Node]) -> Node | None:
    """The first operator that gives NaN or infinity in the compressed network alone.

    ``nodes`` are those of the walk so far, from the first.
    """
    again, finished = walk.again(), last_uses(nodes)
    for node in nodes:
        if node.op != "placeholder":
            again.run_original(node)
            again.run_compressed(node)
            if again.differs(node) and any(
                isinstance(new, Tensor) and bool((old.isfinite() & ~new.isfinite()).any())
                for old, new in zip(again.original[node], again.compressed[node], strict=True)
                if isinstance(new, Tensor) and new.shape == old.shape
            ):
                return node
        again.forget(finished[node])
    return None


def _moved(value: Tensor, storage: UntypedStorage) -> Tensor:
    """The same view of another storage."""
    home = torch.empty(0, dtype=value.dtype, device=value.device)
    return home.set_(storage, value.storage_offset(), value.shape, value.stride())


def _rewritten(value: Value, old: Tensor, new: Tensor) -> Value:
    """A value whose tensors that share the storage of ``old`` are views of that of ``new``."""
    place = old.untyped_storage().data_ptr()

    def shares(part: Value) -> bool:
        return isinstance(part, Tensor) and part.untyped_storage().data_ptr() == place

    def moved(part: Value) -> Value:
        return _moved(part, new.untyped_storage()) if shares(part) else part

    # What nothing has written stays the same object.
    return pytree.tree_map(moved, value) if any(map(shares, pytree.tree_leaves(value))) else value


def draws(node: Node) -> bool:
    """Whether an operator draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    name, given = str(node.target), dict(enumerate(node.args))
    if "scaled_dot_product_attention" in name:
        return bool(node.kwargs.get("dropout_p", given.get(4, 0.0)))
    # In evaluation mode dropout does nothing.
    return not (name.startswith("aten.dropout") and given.get(2) is False)


@contextmanager
def _draws(node: Node) -> Iterator[None]:
    """The same random numbers for an operator in both networks."""
    if not draws(node):
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(crc32(node.name.encode()))
        yield
