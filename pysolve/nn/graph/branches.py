"""Layers of a network's graph: the operators that follow them, and values that give them new weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from math import inf
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from pysolve.correlations import Array, group_columns
from pysolve.nn import layer_matrix as rows
from pysolve.nn.gathering.products import as_called
from pysolve.nn.graph.calls import is_of, operator_name, product_of, stored
from pysolve.nn.graph.export import Graph, is_in_place, where
from pysolve.nn.layer_kinds import LINEAR, Turned, is_extended, plain
from pysolve.plan import Indices, tensor_name

# What ``read_as`` tells a layer's inputs from others by: the tensor first.
Read: TypeAlias = tuple[object, ...]
# Operators that a branch may pass before a sum: in evaluation mode they are the identity.
_PLAIN = {"dropout", "contiguous", "clone", "alias", "detach"}
_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", *_PLAIN}
_POOLS = {"max_pool1d", "max_pool2d", "max_pool3d"}
# Bounds beyond which operators are flat.
_FLAT = {"relu": (0.0, inf), "relu6": (0.0, 6.0), "hardswish": (-3.0, inf), "hardsigmoid": (-3.0, 3.0)}


@dataclass(frozen=True, eq=False)
class Layer:
    """A Linear or an ungrouped convolution, and the operators that follow it.

    Parameters
    ----------
    name : str
    module : nn.Module
    calls : int
        Uses of its weight in the graph; the fields below are for a single call. 0: not in the graph.
    norm : Node, optional
        Batch norm that is its only reader.
    mean : str, optional
        State-dict name of that norm's running mean, which can absorb the layer's bias.
    shortcut, sum : Node, optional
        Node that the layer's branch is added to, and their sum.
    flat : (float, float), optional
        Bounds beyond which what follows, possibly after max-pooling, is flat: 0 and ∞ of a ReLU, 0 and 6 of
        ReLU6.
    besides : str, optional
        What the code of a layer that extends torch's own does that two layers in its place would not do;
        nothing: "". None where no graph shows it.
    """

    name: str
    module: rows.Layer
    calls: int = 1
    norm: Node | None = None
    mean: str | None = None
    shortcut: Node | None = None
    sum: Node | None = None
    flat: tuple[float, float] | None = None
    besides: str | None = None

    @property
    def takes_bias(self) -> bool:
        """Whether a bias needs no new parameter."""
        return self.module.bias is not None or self.mean is not None


@dataclass(frozen=True, eq=False)
class Kept:
    """Kept input and output channels of a layer."""

    inputs: Indices
    outputs: Indices


def find_layers(graph: Graph, model: nn.Module) -> dict[Node, Layer]:
    """All Linear layers and ungrouped convolutions of a graph, by the nodes that call them."""
    modules = {tensor_name(name, "weight"): (name, module) for name, module in model.named_modules()}
    layers: dict[Node, Layer] = {}
    for weight, parameter in graph.parameters.items():
        name, module = modules.get(parameter, ("", None))
        if isinstance(module, rows.LAYERS) and rows.groups(module) == 1:
            calls = [*_users(weight)]
            for node in calls:
                called = _called(graph, node, name, module, weight)
                if called is not None:
                    layer = _layer(graph, node, name, called, len(calls))
                    layers[node] = replace(
                        layer, besides=_besides(node, name, module) if is_extended(module) else ""
                    )
    return layers


def _users(weight: Node) -> Iterator[Node]:
    """Operators that take a weight as it is, or turned."""
    for node in weight.users:
        if stored(node)[0] is weight:
            yield from node.users
        else:
            yield node


def _called(graph: Graph, node: Node, name: str, module: rows.Layer, weight: Node) -> rows.Layer | None:
    """The layer as a node runs it, where that is a call of the layer with its own weight and bias."""
    call = product_of(node)
    if call is None or not is_of(call, module, weight):
        return None
    own = None if module.bias is None else tensor_name(name, "bias")
    if (call.bias is not None and call.bias not in graph.parameters) or graph.parameters.get(
        call.bias
    ) != own:
        return None
    return as_called(module, call)


def idle_nodes(graph: Graph, readers: Collection[Node]) -> set[Node]:
    """Operators whose results nothing needs when these layers read nothing."""
    idle: set[Node] = set()
    for node in reversed(graph.module.graph.nodes):
        if node.op in ("placeholder", "output") or node in readers:
            continue
        if not node.users and not operator_name(node).startswith("_assert"):
            continue
        if all(user in idle or (user in readers and read_by(user) is node) for user in node.users):
            idle.add(node)
    return idle


def is_same(node: Node) -> bool:
    """Whether a node gives what it takes, so that others may use its result in the place of that."""
    given = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if given is None or operator_name(node) not in ("to", *_PLAIN):
        return False
    before, after = given.meta.get("val"), node.meta.get("val")
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype


def _besides(node: Node, name: str, module: rows.Layer) -> str:
    """What the code of a layer does that its first factor, which keeps this code, would not do as well."""
    after = [user for user in _beyond(node, lambda one: [*one.users]) if _is_inside(user, name)]
    before = _beyond(node, lambda one: [read_by(one)] if product_of(one) else one.all_input_nodes[:1])
    if after:
        return f"changes what it makes ({where(after[0])})"
    if isinstance(module, Turned) and any(_is_inside(one, name) for one in before):
        return f"changes what it reads ({where(before[0])})"
    return ""


def _beyond(node: Node, step: Callable[[Node], list[Node]]) -> list[Node]:
    """The nearest nodes in one direction that do more than to reshape."""
    found = []
    for one in step(node):
        found += _beyond(one, step) if operator_name(one) in _RESHAPES else [one]
    return found


def _is_inside(node: Node, name: str) -> bool:
    """Whether a node runs in a layer's own code."""
    stack = node.meta.get("nn_module_stack", {}).values()
    return any(path.partition("@")[0] == name for path, *_ in stack)


def read_by(node: Node) -> Node:
    """What the call of a layer reads."""
    call = product_of(node)
    assert call is not None
    read: Node = call.x
    return read


def read_as(layer: Layer, node: Node) -> Read:
    """The tensor that a layer reads, and the windows that it takes of it: equal where rows of inputs are."""
    names = ("kernel_size", "stride", "padding", "dilation", "output_padding", "padding_mode")
    # What is written in place in between may have changed the tensor.
    writes = sum(map(is_in_place, takewhile(lambda one: one is not node, node.graph.nodes)))
    how = (getattr(layer.module, name, None) for name in names)
    return (read_by(node), writes, plain(layer.module), *how)


def _layer(graph: Graph, node: Node, name: str, module: rows.Layer, calls: int) -> Layer:
    if calls > 1:
        return Layer(name, module, calls)
    norm = _only_user(node)
    norm = norm if norm is not None and _is_norm_of(graph, norm, node, module) else None
    last, user = node, _only_user(node)
    while user is not None and (user is norm or operator_name(user) in _PLAIN):
        last, user = user, _only_user(user)
    shortcut = total = None
    if user is not None and operator_name(user) == "add" and not user.kwargs:
        others = [operand for operand in user.args if isinstance(operand, Node) and operand is not last]
        shortcut, total = (others[0], user) if len(others) == 1 else (None, None)
        user = None if total is None else _only_user(total)
    while user is not None and operator_name(user) in _POOLS:
        user = _only_user(user)
    flat = None if user is None else _flat(user)
    return Layer(name, module, calls, norm, _own_mean(graph, norm), shortcut, total, flat)


def _flat(node: Node) -> tuple[float, float] | None:
    """Bounds beyond which an operator is flat; None where it is nowhere."""
    if operator_name(node) == "hardtanh":
        given = cast(tuple[float, ...], node.args[1:])
        low, high = given + (-1.0, 1.0)[len(given) :]
        return float(low), float(high)
    return _FLAT.get(operator_name(node))


def _is_norm_of(graph: Graph, norm: Node, node: Node, module: rows.Layer) -> bool:
    """Whether a node is a batch norm with fixed statistics over a layer's output channels."""
    if operator_name(norm) != "batch_norm" or norm.args[0] is not node or not isinstance(norm.args[3], Node):
        return False
    fixed = all(part is None or part in graph.parameters for part in norm.args[1:5])
    # Of a Linear that runs over positions these are not the batch norm's channels.
    return fixed and (not isinstance(module, LINEAR) or node.meta["val"].ndim == 2)


def _own_mean(graph: Graph, norm: Node | None) -> str | None:
    """Name of a batch norm's running mean if no other call reads it."""
    mean = None if norm is None else norm.args[3]
    return graph.parameters[mean] if isinstance(mean, Node) and len(mean.users) == 1 else None


def kept_channels(layer: Layer, cut: Kept | None) -> tuple[Tensor, Tensor]:
    """Kept input and output channels, all without a cut, as tensors on the layer's device."""
    kept = map(range, rows.channels(layer.module)) if cut is None else (cut.inputs, cut.outputs)
    inputs, outputs = (torch.as_tensor(one, device=layer.module.weight.device) for one in kept)
    return inputs, outputs


def layer_values(
    state: Mapping[str, Tensor], layer: Layer, cut: Kept | None, M: Array, bias: Array | None
) -> dict[str, Tensor]:
    """New parameters and buffers, by their state-dict names, that give a layer a weight and a bias.

    Parameters
    ----------
    state : {state-dict name: tensor}
        The original's.
    layer : Layer
    cut : Kept, optional
        Kept channels of the layer; None: all. Columns of removed inputs and rows of removed outputs are zero.
    M : (h, d) array
        On the kept inputs and outputs.
    bias : (h,) array, optional
        A layer without one leaves it to its batch norm, whose running mean falls by as much; without a batch
        norm, the layer is given a new one.
    """
    weight = rows.matrix(layer.module)
    inputs, outputs = kept_channels(layer, cut)
    columns = torch.as_tensor(group_columns(inputs.cpu(), rows.taps(layer.module)), device=weight.device)
    new = torch.zeros_like(weight)
    new[outputs[:, None], columns] = torch.as_tensor(M).to(weight)
    values = {tensor_name(layer.name, "weight"): rows.weight_like(layer.module, new)}
    if bias is None:
        return values
    own, change = tensor_name(layer.name, "bias"), torch.as_tensor(bias).to(weight)
    if own not in state and layer.mean is not None:
        return {**values, layer.mean: state[layer.mean].index_add(0, outputs, change, alpha=-1)}
    return {**values, own: new.new_zeros(len(new)).index_copy(0, outputs, change)}


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
