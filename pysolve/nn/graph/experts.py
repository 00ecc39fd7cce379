"""Whole experts of mixtures as sites: the rows of a router, and all tensors that count experts first.

Which expert takes which token is computed, so no label follows the experts through the graph. Their
structure is known instead, and it is tried out like every site: the network with fewer experts must equal
the one whose router never chooses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from pysolve.nn.bare import EXPERTS
from pysolve.nn.graph.calls import operator_name
from pysolve.nn.graph.export import Graph
from pysolve.nn.layer_kinds import plain
from pysolve.plan import Collapse, Site, tensor_name

# Why a network without some channels is not right; None where it is.
Problem = Callable[[Sequence[Collapse]], str | None]


def expert_sites(model: nn.Module, graph: Graph, problem: Problem, free: Sequence[Site]) -> list[Site]:
    """Whole experts of every mixture, tried out.

    Parameters
    ----------
    model : nn.Module
    graph : Graph
        Tells how many experts each token goes to.
    problem : callable
    free : sequence of Site
        Other sites that can shrink: a tensor whose inputs and outputs can both go keeps its experts, for
        costs are products of two sizes.
    """
    modules, offered = dict(model.named_modules()), list[list[Site]]()
    crossed = {name.partition(":")[0] for site in free for name in site.writers if ":" in name}
    crossed &= {name.partition(":")[0] for site in free for name in site.readers if ":" in name}
    for name, experts in modules.items():
        count, leaves = _experts(experts)
        if leaves and (offers := [*_offers(modules, graph, name, count, leaves)]):
            both = {one.partition(":")[0] for one in offers[0].readers} & crossed
            why = "their inputs and their outputs can shrink already" if both else None
            offered.append([replace(one, pinned=why or one.pinned) for one in offers])
    firsts = [offers[0] for offers in offered if offers[0].pinned is None]
    # Most often all of them can go: copies of the network are tried once for all mixtures.
    sound = bool(firsts) and not any(map(problem, _trials(firsts)))
    return [offers[0] if sound else _first_sound(offers, problem) for offers in offered]


def block_of(site: Site) -> str:
    """The module that holds a router and its experts."""
    owners = [
        name.partition(":")[0].rpartition(".")[0] if ":" in name else name
        for name in (*site.writers, *site.readers)
    ]
    parts = [owner.split(".") for owner in owners]
    shared = 0
    while all(len(one) > shared and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    return ".".join(parts[0][:shared])


def _experts(module: nn.Module) -> tuple[int, list[str]]:
    """How many experts a module holds in parameters, and all its tensors that count them."""
    stacks = [one for one in module._parameters.values() if one is not None and one.ndim > 2]
    counts = {len(one) for one in stacks}
    if len(counts) != 1 or 1 in counts or type(module).__module__.startswith("torch."):
        return 0, []
    return len(stacks[0]), _leaves(module, len(stacks[0]))


def _leaves(module: nn.Module, count: int, dims: int | None = None) -> list[str]:
    """Names of a module's own tensors of so many entries in front, the widest first."""
    own: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    found = {leaf: one for leaf, one in own.items() if one is not None and one.ndim and len(one) == count}
    found = {leaf: one for leaf, one in found.items() if dims is None or one.ndim <= dims}
    return sorted(found, key=lambda leaf: -found[leaf].ndim)


def _offers(
    modules: Mapping[str, nn.Module], graph: Graph, name: str, count: int, leaves: Sequence[str]
) -> Iterator[Site]:
    """Sites that experts may be, with the routers nearest to them."""
    readers = tuple(f"{tensor_name(name, leaf)}:{EXPERTS}" for leaf in leaves)
    parts = name.split(".") if name else []
    for depth in range(len(parts), -1, -1):
        block = ".".join(parts[:depth])
        inside = {
            path: module
            for path, module in modules.items()
            if (not block or path == block or path.startswith(f"{block}.")) and path != name
        }
        routers = {path: members for path, one in inside.items() if (members := _router(path, one, count))}
        held = modules[block]
        more = [] if block in routers or block == name else _leaves(held, count, 1)
        for members in routers.values():
            writers = (*members, *(f"{tensor_name(block, leaf)}:{EXPERTS}" for leaf in more))
            within = {**inside, name: modules[name]}
            yield from _sites(within, _chosen(graph, block), count, writers, readers)
        if routers:
            return


def _router(path: str, module: nn.Module, count: int) -> list[str]:
    """Members of a site that a module is, whose rows may choose among so many experts."""
    weight = module._parameters.get("weight")
    if plain(module) is nn.Linear:
        return [path] if weight is not None and weight.shape[0] == count else []
    if type(module).__module__.startswith("torch."):
        return []
    leaves = _leaves(module, count, 2)
    tables = [leaf for leaf in leaves if module._parameters.get(leaf) is not None]
    able = bool(tables) and module._parameters[tables[0]].ndim == 2  # type: ignore[union-attr]
    return [f"{tensor_name(path, leaf)}:{EXPERTS}" for leaf in leaves] if able else []


def _sites(
    inside: Mapping[str, nn.Module],
    chosen: int,
    count: int,
    writers: tuple[str, ...],
    readers: tuple[str, ...],
) -> Iterator[Site]:
    """Experts one by one; and where the router picks among groups, one of each group together."""
    named = {
        tensor_name(path, leaf): value
        for path, module in inside.items()
        for leaf, value in vars(module).items()
        if type(value) is int
    }
    integers = [path for path, value in named.items() if value == count and "expert" in _leaf(path)]
    integers = [path for path in integers if "per_tok" not in path and "top" not in _leaf(path)]
    groups = {value for path, value in named.items() if "group" in _leaf(path) and "top" not in _leaf(path)}
    for size in (1, *sorted(one for one in groups if 1 < one < count and count % one == 0)):
        channels = count // size
        table = np.arange(count).reshape(size, channels).T
        tables = {} if size == 1 else dict.fromkeys((*writers, *readers), table)
        yield Site(
            channels,
            writers,
            readers,
            rows={name: table for name in writers if name in tables},
            columns={name: table for name in readers if name in tables},
            integers=dict.fromkeys(integers, size),
            least=max(1, -(-chosen // size)),
            pinned="every token goes to all of them" if chosen >= count else None,
        )


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _chosen(graph: Graph, block: str) -> int:
    """The most that an operator inside of a module picks."""
    most = 1
    for node in graph.module.graph.nodes:
        if operator_name(node) == "topk" and isinstance(k := node.args[1], int):
            paths = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            most = max(most, k) if block in paths else most
    return most


def _first_sound(offers: Sequence[Site], problem: Problem) -> Site:
    """The first site whose experts can go; the first of all, pinned, where there is none."""
    reasons = []
    for site in offers:
        if site.pinned is None:
            found = (why for steps in _trials([site]) if (why := problem(steps)) is not None)
            reason = next(found, None)
            if reason is None:
                return site
            reasons.append(reason)
    return replace(offers[0], pinned=offers[0].pinned or reasons[0])


def _trials(sites: Sequence[Site]) -> Iterator[list[Collapse]]:
    """Some experts of each site: as few as can be, half of them, all but one."""
    rng = np.random.default_rng(0)
    for sizes in zip(*((s.least, s.channels // 2, s.channels - 1) for s in sites), strict=True):
        kept = [max(site.least, size) for site, size in zip(sites, sizes, strict=True)]
        yield [
            Collapse(site, np.sort(rng.choice(site.channels, k, replace=False)))
            for site, k in zip(sites, kept, strict=True)
        ]
