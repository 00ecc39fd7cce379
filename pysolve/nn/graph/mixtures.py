"""Matrices of experts in one parameter: the operators from the first that reads them to their sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.fx import Node

from pysolve.correlations import Indices, all_but
from pysolve.nn.cut.bare import Stack, find_member, is_stack
from pysolve.nn.cut.slicing import channels_of
from pysolve.nn.graph.calls import operator_name
from pysolve.nn.graph.export import Graph, is_in_place
from pysolve.nn.graph.routes import routed
from pysolve.plan import Site

# Operators in which results of experts are weighed and added up, or put into another shape.
_SUMS = {"to", "view", "reshape", "flatten", "unflatten", "contiguous", "clone", "dropout", "alias", "detach"}
_SUMS |= {"squeeze", "unsqueeze", "transpose", "permute", "mul", "div", "sum", "mean"}


@dataclass(frozen=True, eq=False)
class Mixture:
    """Experts that stay of a mixture, whose results are added up:  y = Σ_e p_e (W_e h_e + b_e).

    Parameters
    ----------
    weight : str
        State-dict name of all W_e, (experts, h, d), or (experts, d, h) where ``turned``.
    bias : str, optional
        State-dict name of all b_e, (experts, h).
    turned : bool
    experts, inputs, outputs : (k,) int arrays
        Those that stay.
    nodes : tuple of Node
        From the first operator that reads either of them to the sum y, in the order of the inputs.
    shortcut : Node, optional
        What y is added to.
    """

    weight: str
    bias: str | None
    turned: bool
    experts: Indices
    inputs: Indices
    outputs: Indices
    nodes: tuple[Node, ...]
    shortcut: Node | None


def mixtures_in(graph: Graph, model: nn.Module, keep: Mapping[Site, Indices]) -> list[Mixture]:
    """Of every mixture that loses experts, or inputs of their last matrices, what its sum may be made of.

    The likeliest first.

    Parameters
    ----------
    graph : Graph
        Of ``model``.
    keep : {Site: (k,) int array}
    """
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
                    one = Mixture(weight, bias, turned, left, inputs, outputs, nodes, _shortcut(nodes[-1]))
                    found += [one] if len(inputs) else []
    return found


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
