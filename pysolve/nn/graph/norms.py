"""Norms in a graph over all channels of a value, with a weight for each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn
from torch.fx import Node

from pysolve.nn.graph.calls import Call, operator_name
from pysolve.nn.graph.classes import along, complete, lean, squashed
from pysolve.nn.graph.export import Graph
from pysolve.plan import Norm, tensor_name

_CASTS = {"to", "_to_copy", "type_as", "float", "contiguous", "clone", "alias"}
# Operators that leave channels where they are along the last dimension.
_PASSES = {*_CASTS, "dropout", "detach", "slice", "select", "index", "unsqueeze", "squeeze", "expand"}
_PASSES |= {"view", "reshape", "_unsafe_view", "flatten"}


def through_norm(call: Call) -> bool:
    """Whether the call, a mean or a whole norm, is of a norm through which channels can go; then it is noted.

    Where not all channels have labels, which bare parameters may still be given, those that have are pinned.
    Other dimensions along which these differ are
    positions where some are alike, as the first of a class token is not; and heads where none are.
    """
    norm = _norm(call)
    core = squashed(lean(call.first))
    varying = [dim for dim, size in enumerate(core.shape[:-1]) if size > 1]
    if norm is None or any(_all_differ(core, dim) for dim in varying):
        return False
    if not complete(core):
        call.ledger.pin(core, call.says("mixes these channels"))
        return True
    rows = call.ledger.member(norm.weight, "norms", call.first.shape[-1])
    core = call.ledger.mix(core, varying, call.says("reads these channels alike"))
    call.ledger.unite(rows, along(core.expand(call.first.shape), -1))
    call.network.norms[norm.weight] = norm
    return True


def _all_differ(labels: Tensor, dim: int) -> bool:
    """Whether no two places along a dimension have the same labels."""
    places = np.unique(labels.movedim(dim, 0).flatten(1).numpy(), axis=0)
    return len(places) == labels.shape[dim]


def _norm(call: Call) -> Norm | None:
    """The norm that a call is, or whose mean square it takes."""
    if call.name in ("rms_norm", "layer_norm"):
        weight, epsilon = call.sources["weight"], call.sources["eps"]
        found = None if weight is None else _named(call, weight, 0.0, epsilon)
        return found and replace(found, centred=call.name == "layer_norm")
    scaled = _scaled(call.node)
    if scaled is None:
        return None
    result, epsilon = scaled
    for user in _users(result):
        for operand in user.all_input_nodes if operator_name(user) == "mul" else ():
            weight, offset = _weight(operand)
            if weight in call.network.parameters:
                return _named(call, weight, offset, epsilon)
    return None


def _named(call: Call, weight: Node, offset: float, epsilon: float | None) -> Norm | None:
    """The norm with its names, if one attribute of the module that holds its weight is this ε."""
    name = call.network.parameters.get(weight, "")
    owner, _, _ = name.rpartition(".")
    module = call.network.modules.get(owner)
    tensor = call.network.state.get(name)
    if module is None or not isinstance(tensor, nn.Parameter) or tensor.ndim != 1:
        return None
    if epsilon is None:
        return Norm(name, tensor_name(owner, "eps"), offset) if isinstance(module, nn.RMSNorm) else None
    held = [leaf for leaf, value in vars(module).items() if type(value) is float and value == epsilon]
    return Norm(name, tensor_name(owner, held[0]), offset) if len(held) == 1 else None


def _scaled(mean: Node) -> tuple[Node, float] | None:
    """x / √(mean x² + ε) and ε, where a node is the mean over the last dimension."""
    value = mean.meta.get("val")
    if not isinstance(value, Tensor) or len(mean.args) < 3 or mean.args[2] is not True:
        return None
    squares, dims = mean.args[:2]
    x = _squared(squares)
    if x is None or dims not in ([-1], [value.ndim - 1], -1):
        return None
    total = _only(mean, "add")
    given = [one for one in total.args if type(one) is float] if total is not None else []
    root = None if total is None else _only(total, "rsqrt")
    if root is None or len(given) != 1:
        return None
    result = _only(root, "mul")
    if result is None or not any(_uncast(one) is x for one in result.all_input_nodes if one is not root):
        return None
    return result, float(given[0])


def _squared(node: object) -> Node | None:
    """x where a node is x², before it was cast."""
    if not isinstance(node, Node) or len(node.all_input_nodes) != 1:
        return None
    name, given = operator_name(node), node.args
    square = name == "square" or (name == "pow" and given[1] == 2) or (name == "mul" and given[0] is given[1])
    return _uncast(node.all_input_nodes[0]) if square else None


def _weight(node: Node) -> tuple[Node, float]:
    """A parameter and what is added to it."""
    node = _uncast(node)
    numbers = [one for one in node.args if isinstance(one, int | float)]
    if operator_name(node) == "add" and len(numbers) == len(node.all_input_nodes) == 1:
        return _uncast(node.all_input_nodes[0]), float(numbers[0])
    return node, 0.0


def _uncast(node: Node) -> Node:
    while operator_name(node) in _CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _users(node: Node) -> Iterator[Node]:
    """What uses a node, cast or not."""
    for user in node.users:
        yield from _users(user) if operator_name(user) in _CASTS else [user]


def _only(node: Node, name: str) -> Node | None:
    """The only user of a node, if it is this operator."""
    users = [*node.users]
    return users[0] if len(users) == 1 and operator_name(users[0]) == name else None


def norm_before(graph: Graph, node: Node, norms: Sequence[Norm]) -> Norm | None:
    """The norm whose values a node holds, all or some of their positions."""
    by_weight = {norm.weight: norm for norm in norms}
    while True:
        name = operator_name(node)
        if name in ("rms_norm", "layer_norm") and isinstance(node.args[2], Node):
            return by_weight.get(graph.parameters.get(node.args[2], ""))
        if name == "mul":
            weights = [_weight(one)[0] for one in node.all_input_nodes]
            found = [by_weight.get(graph.parameters.get(one, "")) for one in weights]
            return next((norm for norm in found if norm is not None), None)
        if name not in _PASSES or not node.args or not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
