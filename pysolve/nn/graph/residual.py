"""Residual branches that can go whole: sites whose readers, without their channels, give a mere constant.

Of  x + f(x)  whose last layer reads one site and nothing else,  x + b  is left without these channels. What
becomes constant is followed through the graph: it must end in sums with what is not. Operators that work
for these channels alone have nothing to do then, and their layers go as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
from torch import Tensor, nn
from torch.fx import Node
from torch.utils.hooks import RemovableHandle

from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.cut.continued import continued, part_ways
from pysolve.nn.graph.bisection import Problem, faults
from pysolve.nn.graph.branches import Layer, find_layers, idle_nodes, is_same
from pysolve.nn.graph.calls import operator_name, product_of
from pysolve.nn.graph.export import Graph, is_in_place
from pysolve.nn.graph.sizes import hint
from pysolve.nn.layer_kinds import LINEAR, twins
from pysolve.nn.layer_matrix import channels
from pysolve.nn.overrides import Args, Kwargs
from pysolve.nn.running import Batch, Output, evaluating, find_layer, forward, hooked
from pysolve.plan import Branch, Collapse, Plan, Site

# Operators that are the identity in evaluation mode, and those that lay a tensor out anew.
_SAME = {"dropout", "contiguous", "clone", "alias", "detach"}
_VIEWS = {"view", "_unsafe_view", "reshape"}
# What a module is given and returns.
_Called: TypeAlias = tuple[Args, Kwargs, Output]


@dataclass(frozen=True, eq=False)
class _Seen:
    """A network, its graph, its layers by name with their nodes, and the modules that each node runs in."""

    model: nn.Module
    graph: Graph
    nodes: Mapping[str, tuple[Node, Layer]]
    shared: Collection[nn.Module]

    @cached_property
    def modules(self) -> dict[Node, list[str]]:
        """Names of the modules that each node runs in, the outermost first."""
        stacks = {one: one.meta.get("nn_module_stack", {}) for one in self.graph.module.graph.nodes}
        return {node: [path.partition("@")[0] for path, *_ in one.values()] for node, one in stacks.items()}

    @cached_property
    def innermost(self) -> dict[str, list[Node]]:
        """Nodes of the modules with parameters that hold no others, but for those that change nothing."""
        found: dict[str, list[Node]] = {}
        for node, names in self.modules.items():
            for name in names if not is_same(node) else ():
                found.setdefault(name, []).append(node)
        return {
            name: found[name]
            for name, module in self.model.named_modules()
            if name in found and not [*module.children()] and [*module.parameters(recurse=False)]
        }


def with_branches(
    sites: Sequence[Site], model: nn.Module, graph: Graph, batch: Batch, problem: Problem
) -> list[Site]:
    """The same sites; those all of whose channels can go have their branch, and 0 for the least that stay.

    Every one is tried: with modules that compute nothing for layers without channels, and where the code
    between them takes none, with one for the whole module that holds them. Decoders that keep what they have
    read must go on from it as before: they may count words by what one attention has kept.
    """
    found = [(node, layer) for node, layer in find_layers(graph, model).items() if layer.calls == 1]
    seen = _Seen(model, graph, {layer.name: (node, layer) for node, layer in found}, twins(model))
    branches = {i: branch for i, site in enumerate(sites) if (branch := _branch(seen, site)) is not None}
    layers = {i: _emptied(sites[i], branch) for i, branch in branches.items()}
    proven, _ = faults(layers, problem)
    others = {i: branch for i, branch in branches.items() if i not in proven}
    whole = dict(_whole(seen, {i: (sites[i], branch) for i, branch in others.items()}, batch))
    proven |= faults({i: _emptied(sites[i], one) for i, one in whole.items()}, problem, proven)[0]
    proven = _going_on(proven, model, batch)
    return [proven[i].site if i in proven else site for i, site in enumerate(sites)]


def _emptied(site: Site, branch: Branch) -> Collapse:
    return Collapse(replace(site, least=0, branch=branch), np.zeros(0, np.intp))


def _going_on(steps: Mapping[int, Collapse], model: nn.Module, batch: Batch) -> dict[int, Collapse]:
    """Steps without which a decoder goes on from what it kept as before.

    Half of them at a time at most: without any attention, nothing depends on how many words were read.
    """

    def able(some: Sequence[int]) -> list[int]:
        plan = Plan(tuple(steps[i] for i in some))
        if not some or not part_ways(masked(model, plan), apply(model, plan), batch):
            return [*some]
        middle = len(some) // 2
        return [*able(some[:middle]), *able(some[middle:])] if middle else []

    numbers = sorted(steps)
    if not numbers or continued(model, batch) is None:
        return dict(steps)
    middle = len(numbers) // 2
    return {i: steps[i] for i in (*able(numbers[:middle]), *able(numbers[middle:]))}


def _branch(seen: _Seen, site: Site) -> Branch | None:
    """What is left of a site's branch without its channels; None where that is not only a constant."""
    if site.pinned is not None or site.norms or site.router is not None:
        return None
    if not all(map(seen.nodes.__contains__, site.readers)):
        return None
    readers = [seen.nodes[name] for name in site.readers]
    for _, layer in readers:
        width = channels(layer.module)[0]
        if layer.module in seen.shared or site.columns_of(layer.name, width).size < width:
            return None
    written = _ends_in_sums(seen.graph, [node for node, _ in readers])
    if written is None:
        return None
    norms = {layer.name: _norm_of(seen, layer) for _, layer in readers}
    idle = _idle(seen, site, [node for node, _ in readers])
    return Branch({name: norm for name, norm in norms.items() if norm}, tuple(idle), written)


def _ends_in_sums(graph: Graph, readers: Sequence[Node]) -> bool | None:
    """Whether constants of these nodes are written into; None where they are more than terms of sums."""
    constant, fixed, written = {*readers}, set[Node](), False
    for node in graph.module.graph.nodes:
        inputs = node.all_input_nodes
        if node in constant:
            continue
        if not constant.intersection(inputs):
            if _is_fixed(graph, node) or (node.op != "placeholder" and fixed.issuperset(inputs)):
                fixed.add(node)
            continue
        if all(one in constant or one in fixed for one in inputs):
            if node.op == "output" or product_of(node) is not None:
                return None
            constant.add(node)
        elif operator_name(node) != "add" or node.op == "output" or not _is_sum(node, constant):
            return None
        written |= is_in_place(node) and node.args[0] in constant
    return written


def _is_fixed(graph: Graph, node: Node) -> bool:
    """Whether a node is a parameter, a constant, or no tensor: the same whatever the network reads."""
    if node.op == "placeholder":
        return node not in graph.inputs
    return not isinstance(node.meta.get("val"), Tensor)


def _is_sum(node: Node, constant: Collection[Node]) -> bool:
    """Whether a node adds a constant to what has the shape of the sum."""
    others = [one for one in node.args[:2] if isinstance(one, Node) and one not in constant]
    shapes = [[*map(hint, one.meta["val"].shape)] for one in (node, *others)]
    return len(others) == 1 and not node.kwargs and shapes[0] == shapes[1]


def _norm_of(seen: _Seen, layer: Layer) -> str:
    """Batch norm behind a layer that has a bias for the constant."""
    owner = "" if layer.mean is None else layer.mean.rpartition(".")[0]
    return owner if owner and find_layer(seen.model, owner).bias is not None else ""


def _idle(seen: _Seen, site: Site, readers: Collection[Node]) -> Iterator[str]:
    """Layers with parameters whose results nothing reads without a site's channels."""
    idle, members = idle_nodes(seen.graph, readers), {*site.writers, *site.passed, *site.readers}
    for name, nodes in seen.innermost.items():
        if name not in members and idle.issuperset(nodes):
            yield name


def _whole(
    seen: _Seen, wanted: Mapping[int, tuple[Site, Branch]], batch: Batch
) -> Iterator[tuple[int, Branch]]:
    """Branches with the module that holds all of one, of those that lie in one of their own."""
    holders = {i: name for i, (site, _) in wanted.items() if (name := _holder(seen, site))}
    calls = _calls(seen.model, {*holders.values()}, batch) if holders else {}
    for i, name in holders.items():
        site, branch = wanted[i]
        width = channels(seen.nodes[site.readers[0]][1].module)[1]
        found = [_described(*call, width) for call in calls[name]]
        if len(found) == 1 and found[0] is not None:
            argument, results, position = found[0]
            inside = tuple(one for one in branch.idle if not one.startswith(f"{name}."))
            yield (
                i,
                replace(
                    branch, idle=inside, whole=name, argument=argument, results=results, position=position
                ),
            )


def _holder(seen: _Seen, site: Site) -> str:
    """The innermost module that holds a branch and nothing else; "" if there is none."""
    if len(site.readers) > 1 or not isinstance(seen.nodes[site.readers[0]][1].module, LINEAR):
        return ""
    last = seen.nodes[site.readers[0]][0]
    paths = [name.split(".")[:-1] for name in (*site.writers, *site.readers)]
    common = paths[0]
    for path in paths:
        same = [a == b for a, b in zip(common, path, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    name = ".".join(common)
    inside = [node for node in seen.graph.module.graph.nodes if name and name in seen.modules[node]]
    while len(ends := [*last.users]) == 1 and ends[0] in inside:
        if operator_name(ends[0]) not in _SAME | _VIEWS:
            return ""
        last = ends[0]
    leaving = {one for one in inside if any(user not in inside for user in one.users)}
    return name if leaving == {last} else ""


def _calls(model: nn.Module, names: Collection[str], batch: Batch) -> dict[str, list[_Called]]:
    """What modules are given and return."""
    calls: dict[str, list[_Called]] = {name: [] for name in names}

    def note(name: str) -> RemovableHandle:
        def hook(_: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> None:
            calls[name].append((args, kwargs, output))

        return find_layer(model, name).register_forward_hook(hook, with_kwargs=True)

    with hooked(note(name) for name in names), evaluating(model):
        forward(model, batch)
    return calls


def _described(args: Args, kwargs: Kwargs, output: Output, width: int) -> tuple[int | str, int, int] | None:
    """The argument that has the result's shape, how many results there are, and which one it is."""
    parts = list(output) if type(output) is tuple else [output]
    found = [i for i, one in enumerate(parts) if isinstance(one, Tensor) and one.shape[-1:] == (width,)]
    if not found:
        return None
    shape = parts[found[0]].shape
    given: list[tuple[int | str, object]] = [*enumerate(args), *kwargs.items()]
    alike = [
        key
        for key, one in given
        if isinstance(one, Tensor) and one.is_floating_point() and one.shape[:-1] == shape[:-1]
    ]
    return (alike[0], len(parts) * (type(output) is tuple), found[0]) if alike else None
