"""Matrices of experts, in one parameter or a list of modules: the operators from the first to their sum."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import Tensor, nn
from torch.fx import Node

from pysolve.correlations import Indices, all_but
from pysolve.nn.cut.bare import Stack, find_member, is_stack
from pysolve.nn.cut.slicing import channels_of
from pysolve.nn.graph.branches import find_layers, read_by
from pysolve.nn.graph.calls import operator_name
from pysolve.nn.graph.export import Graph, is_in_place
from pysolve.nn.graph.routes import routed
from pysolve.nn.layer_kinds import plain
from pysolve.plan import EXPERTS, Site, tensor_name

# Operators in which results of experts are weighed and added up, or put into another shape.
_SUMS = {"to", "view", "reshape", "flatten", "unflatten", "contiguous", "clone", "dropout", "alias", "detach"}
_SUMS |= {"squeeze", "unsqueeze", "transpose", "permute", "mul", "div", "sum", "mean"}


@dataclass(frozen=True, eq=False)
class Mixture:
    """Experts that stay of a mixture, whose results are added up:  y = Σ_e p_e (W_e h_e + b_e).

    Parameters
    ----------
    weights : tuple of str
        State-dict name of all W_e, (experts, h, d), or (experts, d, h) where ``turned``; or one for each.
    biases : tuple of str
        Likewise of the b_e, where there are any.
    turned : bool
    experts : (k,) int array
        Those that stay.
    inputs : tuple of int arrays
        That stay of each matrix.
    outputs : (h,) int array
    nodes : tuple of Node
        From the first operator that reads either of them to the sum y, in the order of the inputs.
    shortcut : Node, optional
        What y is added to.
    before : tuple of Node
        Operators between these that read none of their results, and must run first.
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...]
    turned: bool
    experts: Indices
    inputs: tuple[Indices, ...]
    outputs: Indices
    nodes: tuple[Node, ...]
    shortcut: Node | None
    before: tuple[Node, ...] = ()


def mixtures_in(
    graph: Graph, model: nn.Module, keep: Mapping[Site, Indices], sites: Iterable[Site] = ()
) -> list[Mixture]:
    """Of every mixture that loses experts, or inputs of their last matrices, what its sum may be made of.

    The likeliest first.

    Parameters
    ----------
    graph : Graph
        Of ``model``.
    keep : {Site: (k,) int array}
    sites : iterable of Site
        Those of whole experts tell which lists of modules are experts.
    """
    routers = [site for site in {*sites, *keep} if site.router is not None]
    lists = dict.fromkeys(name.partition(":")[0] for site in routers for name in site.readers)
    modules = [name for name in lists if isinstance(dict(model.named_modules()).get(name), nn.ModuleList)]
    listed = (_of_list(graph, model, name, keep) for name in modules)
    return [*_of_parameters(graph, model, keep), *(one for one in listed if one is not None)]


def in_order(nodes: Sequence[Node], mixtures: Iterable[Mixture]) -> tuple[list[Node], list[Mixture]]:
    """Nodes with what must run before mixtures in front of these, and the mixtures where that is possible."""
    found, able = [*nodes], []
    for one in mixtures:
        own = [*one.before, *one.nodes]
        start = min(map(found.index, own))
        if not one.before or {*found[start : start + len(own)]} == {*own}:
            found[start : start + len(own)] = own if one.before else found[start : start + len(own)]
            able.append(one)
    return found, able


def _of_parameters(graph: Graph, model: nn.Module, keep: Mapping[Site, Indices]) -> list[Mixture]:
    """Mixtures whose matrices are in one parameter."""
    read = {name: node for node, name in graph.parameters.items() if node.users}
    order = {node: place for place, node in enumerate(graph.module.graph.nodes)}
    # What computes an expert's hidden values is read before.
    first = {name: min(order[user] for user in node.users) for name, node in read.items()}
    experts, apart = _experts(model, keep, first), routed(graph)
    shapes = {name: tuple(node.meta["val"].shape) for name, node in read.items()}
    found = []
    for weight, left in experts.items():
        beside = [name for name in read if name.rpartition(".")[0] == weight.rpartition(".")[0]]
        beside = [name for name in beside if shapes[name][0] == shapes[weight][0] and len(shapes[name]) == 2]
        for bias in [*sorted(beside, key=first.__getitem__, reverse=True), None]:
            nodes = _region(graph, [read[name] for name in (weight, bias) if name is not None], apart)
            width = nodes[-1].meta["val"].shape[-1] if nodes else 0
            for turned in (False, True):
                if width == shapes[weight][1 + turned] and (bias is None or width == shapes[bias][1]):
                    inputs, outputs = _left(model, keep, weight, turned)
                    names = ((weight,), () if bias is None else (bias,))
                    each = (inputs,) * shapes[weight][0]
                    one = Mixture(*names, turned, left, each, outputs, nodes, _shortcut(nodes[-1]))
                    found += [one] if len(inputs) else []
    return found


def _of_list(graph: Graph, model: nn.Module, name: str, keep: Mapping[Site, Indices]) -> Mixture | None:
    """The mixture whose experts are the modules of a list; None where nothing goes, or it is none."""
    experts = model.get_submodule(name)
    assert isinstance(experts, nn.ModuleList)
    called = {layer.name: node for node, layer in find_layers(graph, model).items() if layer.calls == 1}
    order = {node: place for place, node in enumerate(graph.module.graph.nodes)}
    leaves = [leaf for leaf, module in experts[0].named_modules() if plain(module) is nn.Linear]
    paths = [[".".join(filter(None, (name, str(e), leaf))) for e in range(len(experts))] for leaf in leaves]
    paths = [own for own in paths if all(path in called for path in own)]
    if not paths:
        return None
    last = max(paths, key=lambda own: order[called[own[0]]])
    layers = {path: cast(nn.Linear, model.get_submodule(path)) for path in last}
    inputs, outputs = (tuple(_kept(role, layers, keep)) for role in ("readers", "writers"))
    left = [np.sort(kept) for site, kept in keep.items() if f"{name}:{EXPERTS}" in site.readers]
    stays = left[0] if left else np.arange(len(experts))
    goes = sum(map(len, inputs)) < sum(layer.in_features for layer in layers.values())
    if not (goes or len(stays) < len(experts)) or any(not np.array_equal(one, outputs[0]) for one in outputs):
        return None
    weights, biases = (tuple(tensor_name(path, leaf) for path in last) for leaf in ("weight", "bias"))
    biases = biases if layers[last[0]].bias is not None else ()
    read = {name: node for node, name in graph.parameters.items()}
    values = [read[one] for one in (*weights, *biases)]
    region = _region(graph, values, routed(graph))
    before, nodes = _apart(region, values, [called[path] for path in last])
    if not nodes:
        return None
    return Mixture(
        weights, biases, False, stays, inputs, outputs[0], nodes, _shortcut(nodes[-1]), before=before
    )


def _kept(role: str, layers: Mapping[str, nn.Linear], keep: Mapping[Site, Indices]) -> Iterator[Indices]:
    """Inputs of each layer that stay, or outputs."""
    for name, layer in layers.items():
        left = np.ones(layer.weight.shape[role == "readers"], bool)
        for site, kept in keep.items():
            if name in getattr(site, role):
                gone = all_but(site.channels, kept)
                left[channels_of(site, role, name, layer)[gone].ravel()] = False
        yield np.flatnonzero(left)


def _apart(
    region: Sequence[Node], parameters: Collection[Node], layers: Sequence[Node]
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Operators on which parameters have no effect, and the others; none where these cannot run last."""
    acts, before, nodes = set(parameters), [], []
    for node in region:
        if acts.intersection(node.all_input_nodes):
            nodes.append(node)
            acts.update([node, *node.all_input_nodes[: is_in_place(node)]])
        else:
            before.append(node)
    written = {_storage(node.all_input_nodes[0]) for node in nodes if is_in_place(node)}
    seen = {_storage(one) for node in before for one in node.all_input_nodes}
    inside = any(read_by(node) in acts for node in layers)
    if inside or written & seen or any(map(is_in_place, before)):
        return (), ()
    return tuple(before), tuple(nodes)


def _storage(node: Node) -> Node:
    """The value whose memory a node may share."""
    while getattr(node.target, "_schema", None) and node.all_input_nodes:
        if not any(one.alias_info for one in node.target._schema.returns):  # type: ignore[union-attr]
            break
        node = node.all_input_nodes[0]
    return node


def _experts(model: nn.Module, keep: Mapping[Site, Indices], first: Mapping[str, int]) -> dict[str, Indices]:
    """Experts that stay, by the parameter of three dimensions that is read last in each mixture."""
    found: dict[str, Indices] = {}
    for site, kept in keep.items():
        stacks = [name for name in site.readers if is_stack(name) and name.partition(":")[0] in first]
        stacks = [name for name in stacks if _values(model, name).ndim == 3]
        if len(kept) < site.channels and stacks:
            name = max(stacks, key=lambda one: first[one.partition(":")[0]])
            weight = name.partition(":")[0]
            if site.router is not None:
                table = channels_of(site, "readers", name, find_member(model, name))
                found[weight] = np.sort(table[kept].ravel())
            else:
                found.setdefault(weight, np.arange(len(_values(model, name))))
    return found


def _values(model: nn.Module, name: str) -> Tensor:
    member = find_member(model, name)
    assert isinstance(member, Stack)
    return member.values


def _region(graph: Graph, parameters: Collection[Node], apart: Collection[Node]) -> tuple[Node, ...]:
    """Operators from the first that reads parameters to the sum through which all of them act.

    Its rows are not routed; nothing where there is no such value.
    """
    nodes = [*graph.module.graph.nodes]
    order = {node: place for place, node in enumerate(nodes)}
    own, acts, first = set(parameters), set(parameters), len(nodes)
    reach = max(order[user] for one in parameters for user in one.users)
    for place, node in enumerate(nodes[:-1]):
        if not acts.intersection(node.all_input_nodes):
            continue
        first = min(first, place)
        if own.issuperset(node.all_input_nodes):
            own.add(node)
        elif place >= reach and node not in apart and _is_row(node):
            return tuple(nodes[first : order[_summed(node)] + 1])
        new = [node, *node.all_input_nodes[: is_in_place(node)]]
        acts.update(new)
        reach = max([reach, *(order[user] for one in new for user in one.users)])
    return ()


def _summed(node: Node) -> Node:
    """The value behind the weights and sums of experts, whose order may differ from network to network."""
    last, user = node, _follower(node)
    while user is not None and operator_name(user) in _SUMS and _is_row(user):
        last, user = user, _follower(user)
    return last


def _is_row(node: Node) -> bool:
    """Whether a value may be rows of outputs."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 1 and value.is_floating_point()


def _left(
    model: nn.Module, keep: Mapping[Site, Indices], weight: str, turned: bool
) -> tuple[Indices, Indices]:
    """Inputs and outputs that stay of each matrix."""
    name = f"{weight}:{'io' if turned else 'oi'}"
    member = find_member(model, name)
    assert isinstance(member, Stack)
    inputs, outputs = np.ones(member.inputs, bool), np.ones(member.outputs, bool)
    for site, kept in keep.items():
        gone = all_but(site.channels, kept)
        for role, members, left in (("readers", site.readers, inputs), ("writers", site.writers, outputs)):
            if name in members:
                left[channels_of(site, role, name, member)[gone].ravel()] = False
    return np.flatnonzero(inputs), np.flatnonzero(outputs)


def _shortcut(node: Node) -> Node | None:
    """What a sum of experts is added to right behind."""
    user = _follower(node)
    if user is None or operator_name(user) != "add" or user.kwargs:
        return None
    others = [one for one in user.args if isinstance(one, Node) and one is not node]
    return others[0] if len(others) == 1 else None


def _follower(node: Node) -> Node | None:
    """The only operator that uses a value, beside checks."""
    users = [user for user in node.users if not operator_name(user).startswith("_assert")]
    return users[0] if len(users) == 1 else None
