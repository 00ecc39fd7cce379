"""Channel labels run through a network's graph: which channels belong together, and what pins them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from pysolve.nn.graph import layer_rules, operators, recurrent_rules
from pysolve.nn.graph.calls import Call, Network, is_own, operator_name, pointwise
from pysolve.nn.graph.classes import Classes, Member, labelled, lean, none, spread, squashed
from pysolve.nn.graph.export import Graph, Value, where
from pysolve.nn.graph.operators import Rule
from pysolve.nn.graph.sizes import hint
from pysolve.nn.layer_kinds import twins

_LAYERS: dict[str, Rule] = {**layer_rules.RULES, **recurrent_rules.RULES}
_RULES: dict[str, Rule] = {**operators.RULES, **_LAYERS}
_OF_LAYERS = set(_LAYERS.values())
# Operators that may lay channels out in a grid.
_VIEWS = {"view", "_unsafe_view", "view_as", "reshape", "reshape_as", "unflatten"}
# Operators that run a graph of their own as it is.
_WRAPPERS = {"wrap_with_autocast", "wrap_with_set_grad_enabled", "tag_activation_checkpoint"}


def label_channels(
    model: nn.Module,
    graph: Graph,
    training: Graph | None = None,
    lines: Mapping[Node, int] | None = None,
    *,
    inner: bool = False,
) -> Classes:
    """Give every channel that a layer makes a label, and run the graph's operators on the labels.

    Operators that move values move labels; elementwise ones unite labels that meet; sums over channels and
    norms unite all of these; operators without a rule pin the channels that they read. Bare parameters and
    buffers that would pin channels get labels, too, which unite with those that they meet. Channels that meet
    parameters used in ``training`` alone, a graph of the network in training mode, are pinned: no data show
    what these parameters are for. ``lines`` keeps rows or columns of some views together.
    ``inner``: channels are dimensions of attention heads, not whole heads.
    """
    bare: dict[str, int] = {}
    while True:
        network = _labelled(model, graph, bare, lines or {}, inner=inner)
        found = network.ledger.resolve()
        new = {name: dim for name, dim in _bare(network, found) if name not in bare}
        if not new:
            break
        bare |= new
    if training is not None:
        _pin_trained(network, _network(model, training, unseen=set(network.state) - graph.used), training)
        found = network.ledger.resolve()
    grids = {node: {*found.roots[one].tolist()} for node, one in network.grids.items()}
    return replace(found, grids=grids, norms=network.norms, attended=tuple(network.attended))


def _labelled(
    model: nn.Module, graph: Graph, bare: Mapping[str, int], lines: Mapping[Node, int], *, inner: bool
) -> Network:
    """The network with its ledger after one run, bare tensors labelled along these dimensions."""
    network = replace(_network(model, graph), lines=lines, inner=inner)
    made = {
        node: _bare_labels(network, name, bare[name])
        for node, name in graph.parameters.items()
        if name in bare
    }
    output = _run(graph.module, {**made}, network)
    for value in pytree.tree_leaves(output):
        if isinstance(value, Tensor):
            network.ledger.pin(value, "the network's output")
    for member in network.ledger.members.values():
        if member.layer in network.elsewhere:
            network.ledger.pin(member.labels, network.elsewhere[member.layer])
    return network


def _bare(network: Network, found: Classes) -> Iterator[tuple[str, int]]:
    """Bare tensors that pin channels, and the dimension along which they can lose values with these."""
    for name in sorted({name for name, _ in found.blamed}):
        tensor = network.state[name]
        sizes = {size for blamed, size in found.blamed if blamed == name}
        large = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        fits = [dim for dim in large if tensor.shape[dim] in sizes or len(large) == 1]
        if len(fits) == 1 and is_own(network, name):
            yield name, fits[0]


def _bare_labels(network: Network, name: str, dim: int) -> Tensor:
    """Labels of a bare tensor, which vary along one dimension."""
    shape = network.state[name].shape
    labels = spread(network.ledger.fresh(shape[dim]), dim, shape)
    network.ledger.members[name, "passed"] = Member(name, "passed", labels.reshape(-1))
    return labels


def _pin_trained(network: Network, twin: Network, training: Graph) -> None:
    """Pin the channels that parameters which are used in training alone work on."""
    _run(training.module, {}, twin)
    roots = torch.from_numpy(twin.ledger.resolve().roots)
    for key in network.ledger.members.keys() & twin.ledger.members.keys():
        labels, classes = network.ledger.members[key].labels, roots[twin.ledger.members[key].labels]
        for touched, reason in twin.trained:
            network.ledger.pin(labels[torch.isin(classes, roots[touched])], reason)


def _network(model: nn.Module, graph: Graph, unseen: Collection[str] = ()) -> Network:
    """Data about the network that rules read."""
    tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    state = dict(chain(*tensors))
    modules = dict(model.named_modules(remove_duplicate=False))
    ties: dict[nn.Module, str] = {}
    owners: dict[int, str] = {}
    for name, tensor in state.items():
        # Pointer 0: nothing is stored, on the meta device for example.
        other = owners.setdefault(tensor.data_ptr(), name) if tensor.data_ptr() else name
        own, layer = (modules[one.rpartition(".")[0]] for one in (name, other))
        if own is not layer:
            ties.setdefault(own, other)
            ties.setdefault(layer, name)
    names = {module: name for name, module in model.named_modules()}
    return Network(modules, names, state, ties, twins(model), dict(graph.parameters), unseen)


def _run(module: GraphModule, env: dict[Node, Value], network: Network) -> Value:
    """Labels of a graph's output, from those of the placeholders that are known."""
    for node in module.graph.nodes:
        if node.op == "output":
            return map_arg(node.args[0], env.__getitem__)
        if node.op == "get_attr":
            env[node] = getattr(module, str(node.target), None)
        elif node not in env:
            env[node] = _evaluate(node, env, network)
    return None


def _evaluate(node: Node, env: Mapping[Node, Value], network: Network) -> Value:
    """Labels of one operator's result; other values stay as they are."""
    result = pytree.tree_map(_unlabelled, node.meta.get("val"))
    result = list(result) if isinstance(result, tuple) else result
    args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
    if node.op == "placeholder" or result is None:
        return result
    if operator_name(node) in _WRAPPERS:
        return _inside(node, args, network)
    if operator_name(node) == "getitem" and isinstance(args[0], list | tuple):
        position: Value = args[1]
        return args[0][position]
    if isinstance(node.target, HigherOrderOperator):
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                network.ledger.pin(value, f"{operator_name(node)} is not understood ({where(node)})")
    if not isinstance(node.target, OpOverload):
        return result
    call = _call(node, args, kwargs, result, network)
    _note_uses(call)
    found = _checked(call)
    _note_grid(call, found)
    _note_training(call, found)
    return found


def _checked(call: Call) -> Value:
    """Labels by the operator's rule if they have the right shape; otherwise the channels are pinned."""
    rule = _rule(call)
    if rule not in _OF_LAYERS and not any(labelled(value) for value, _ in call.tensors):
        return call.result
    moves = isinstance(call.result, Tensor | list)
    if not moves and call.name.startswith("sym_"):
        return call.result
    reason = call.says("is not understood")
    if rule is None or not moves:
        return call.opaque(reason)
    try:
        value = rule(call)
    # Rules run torch's own operators on labels, and these refuse what they do not expect in many ways.
    except (RuntimeError, TypeError, ValueError, LookupError):
        return call.opaque(reason)
    if _shapes(value) != _shapes(call.result):
        return call.opaque(reason)
    return [lean(one) for one in value] if isinstance(value, list | tuple) else lean(value)


def _rule(call: Call) -> Rule | None:
    target: Value = call.node.target
    functional = getattr(torch.ops.aten, call.name, None)
    same: Value = getattr(functional, target._overloadname, target)
    if torch.Tag.pointwise in {*target.tags, *same.tags}:
        return pointwise
    return _RULES.get(call.name)


def _call(node: Node, args: Value, kwargs: Value, result: Value, network: Network) -> Call:
    schema = node.target._schema.arguments  # type: ignore[union-attr]

    def bound(given: Value, named: Value) -> dict[str, Value]:
        rest = {a.name: named.get(a.name, a.default_value) for a in schema[len(given) :]}
        return {**{a.name: value for a, value in zip(schema, given, strict=False)}, **rest}

    return Call(node, bound(args, kwargs), bound(node.args, node.kwargs), (args, kwargs), result, network)


def _inside(node: Node, args: tuple[Value, ...], network: Network) -> Value:
    """Labels of what a block of code under autocast or without gradients returns."""
    position = next(i for i, one in enumerate(args) if isinstance(one, GraphModule))
    inner: GraphModule = args[position]
    placeholders = [one for one in inner.graph.nodes if one.op == "placeholder"]
    for placeholder, outer in zip(placeholders, node.args[position + 1 :], strict=True):
        if outer in network.parameters:
            network.parameters[placeholder] = network.parameters[outer]  # type: ignore[index]
    return _run(inner, dict(zip(placeholders, args[position + 1 :], strict=True)), network)


def _note_uses(call: Call) -> None:
    """Record layers whose parameters are used outside of them."""
    for node in call.node.all_input_nodes:
        name = call.network.parameters.get(node)
        owner = call.network.modules[name.rpartition(".")[0]] if name else None
        if owner is not None and call.module not in (owner, *call.network.twins.get(owner, ())):
            layer = call.network.names[owner]
            call.network.elsewhere[layer] = f"`{name}` is used outside of its layer ({where(call.node)})"


def _note_grid(call: Call, found: Value) -> None:
    """Record a view that lays the channels of one dimension out along several, and unite lines of them."""
    if call.name not in _VIEWS or not isinstance(found, Tensor) or not labelled(found):
        return
    before, core = squashed(call.first), squashed(found)
    varying = [dim for dim, size in enumerate(core.shape) if size > 1]
    if sum(size > 1 for size in before.shape) == 1 < len(varying):
        call.network.grids[call.node] = core[core >= 0]
        if call.node in call.network.lines:
            dim = varying[call.network.lines[call.node]]
            call.ledger.mix(core, (dim,), call.says("lays these channels out in a grid"))


def _note_training(call: Call, found: Value) -> None:
    """Record the channels that meet a parameter which is used in training alone."""
    names = (call.network.parameters.get(node) for node in call.node.all_input_nodes)
    unseen = next((name for name in names if name in call.network.unseen), None)
    if unseen is not None:
        reason = f"`{unseen}` works on these channels in training alone ({where(call.node)})"
        for value in pytree.tree_leaves([found, *(value for value, _ in call.tensors)]):
            if isinstance(value, Tensor) and labelled(value):
                labels = squashed(value)
                call.network.trained.append((labels[labels >= 0], reason))


def _unlabelled(value: Value) -> Value:
    """A traced value without labels, in its shape on the example."""
    return none([_hint(size) for size in value.shape]) if isinstance(value, Tensor) else _hint(value)


def _hint(value: Value) -> Value:
    """A traced number's value on the example; of a size that depends on data, what it might be."""
    if isinstance(value, torch.SymInt):
        return hint(value)
    return value.node.hint or 0 if isinstance(value, torch.SymFloat | torch.SymBool) else value


def _shapes(value: Value) -> object:
    if isinstance(value, list | tuple):
        return [_shapes(one) for one in value]
    return tuple(value.shape) if isinstance(value, Tensor) else None
