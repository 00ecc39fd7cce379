"""Whole experts of mixtures as sites: the rows of a router, and all tensors that count experts first.

Which expert takes which token is computed, so no label follows the experts through the graph. Their
structure is known instead, and it is tried out like every site: the network with fewer experts must equal
the one whose router never chooses them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from pysolve.nn.graph.bisection import Problem
from pysolve.nn.graph.calls import operator_name
from pysolve.nn.graph.export import Graph
from pysolve.nn.layer_kinds import plain
from pysolve.plan import EXPERTS, Collapse, Site, tensor_name


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
    modules = dict(model.named_modules())
    crossed = {name.partition(":")[0] for site in free for name in site.writers if ":" in name}
    crossed &= {name.partition(":")[0] for site in free for name in site.readers if ":" in name}
    offered = []
    for (block, count), readers in _mixtures(modules).items():
        offers = [*_offers(modules, graph, block, count, tuple(readers))]
        if {one.partition(":")[0] for one in readers} & crossed:
            why = (
                "inputs and outputs of these experts can shrink already, and costs are products of two sizes"
            )
            offers = [replace(one, pinned=why) for one in offers]
        offered.append(offers)
    firsts = [offers[0] for offers in offered if offers[0].pinned is None]
    # Most often all of them can go: copies of the network are tried once for all mixtures.
    sound = bool(firsts) and not any(map(problem, _trials(firsts)))
    found = [offers[0] if sound else _first_sound(offers, problem) for offers in offered]
    # Lists of blocks may be as long as some layer is wide.
    lists = {f"{name}:{EXPERTS}" for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    blocks = {name for name in lists if "expert" not in name}
    return [one for one in found if one.pinned is None or not blocks.intersection(one.readers)]


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


def _mixtures(modules: Mapping[str, nn.Module]) -> dict[tuple[str, int], list[str]]:
    """Members that count experts, by the module that holds them with a router, and their number."""
    counts = {name: count for name, module in modules.items() if (count := _experts(module)) > 1}
    found: dict[tuple[str, int], list[str]] = {}
    for name, count in counts.items():
        parts = name.split(".") if name else []
        blocks = [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
        block = next((one for one in blocks if _routers(modules, one, count, counts)), None)
        if block is not None:
            found.setdefault((block, count), []).extend(_counting(name, modules[name], count))
    return found


def _counting(name: str, module: nn.Module, count: int) -> list[str]:
    """Members of a site that a module of experts is."""
    if isinstance(module, nn.ModuleList):
        return [f"{name}:{EXPERTS}"]
    return _members(name, _leaves(module, count))


def _experts(module: nn.Module) -> int:
    """How many experts a module holds, in parameters or as modules that are alike; 0 where it holds none."""
    if isinstance(module, nn.ModuleList):
        kinds = {
            (type(one), *((name, value.shape) for name, value in one.named_parameters())) for one in module
        }
        return len(module) if len(kinds) == 1 and any(True for _ in module.parameters()) else 0
    stacks = [one for one in module._parameters.values() if one is not None and one.ndim > 2]
    counts = {len(one) for one in stacks}
    return counts.pop() if len(counts) == 1 and not type(module).__module__.startswith("torch.") else 0


def _members(path: str, leaves: Sequence[str]) -> list[str]:
    return [f"{tensor_name(path, leaf)}:{EXPERTS}" for leaf in leaves]


def _leaves(module: nn.Module, count: int, dims: int | None = None) -> list[str]:
    """Names of a module's own tensors of so many entries in front, the widest first."""
    own: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    found = {leaf: one for leaf, one in own.items() if one is not None and one.ndim and len(one) == count}
    found = {leaf: one for leaf, one in found.items() if dims is None or one.ndim <= dims}
    return sorted(found, key=lambda leaf: -found[leaf].ndim)


def _offers(
    modules: Mapping[str, nn.Module], graph: Graph, block: str, count: int, readers: tuple[str, ...]
) -> Iterator[Site]:
    """Sites that experts may be, with each of the routers beside them."""
    paths = (name.partition(":")[0] for name in readers)
    apart = {path if path in modules else path.rpartition(".")[0] for path in paths}
    routers = _routers(modules, block, count, apart)
    more = [] if {block} & (routers.keys() | apart) else _members(block, _leaves(modules[block], count, 1))
    inside = {path: module for path, module in modules.items() if _is_in(path, block)}
    for members in routers.values():
        yield from _sites(inside, _chosen(graph, block), count, (*members, *more), readers)


def _routers(
    modules: Mapping[str, nn.Module], block: str, count: int, apart: Collection[str]
) -> dict[str, list[str]]:
    """Members of sites that may choose among so many experts, by the modules inside of a block."""
    experts = [one for one in apart if not _is_in(block, one)]
    beside = (
        (path, one)
        for path, one in modules.items()
        if _is_in(path, block) and path not in apart and not any(_is_in(path, e) for e in experts)
    )
    return {path: members for path, one in beside if (members := _router(path, one, count))}


def _is_in(path: str, block: str) -> bool:
    return not block or path == block or path.startswith(f"{block}.")


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
    return _members(path, leaves) if able else []


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
    most = [value for path, value in named.items() if "per_tok" in path or _leaf(path) in ("top_k", "topk")]
    chosen = max([chosen, *(value for value in most if value <= count)])
    sizes = [(1, chosen)]
    # A router that takes the best groups looks at several experts of each.
    for size in sorted(one for one in groups if 1 < one < count and count % one == 0):
        sizes += [(size, least) for least in (-(-chosen // size), chosen)]
    for size, least in sizes:
        channels = count // size
        table = np.arange(count).reshape(size, channels).T
        yield Site(
            channels,
            writers,
            readers,
            rows={} if size == 1 else dict.fromkeys(writers, table),
            columns={} if size == 1 else dict.fromkeys(readers, table),
            integers=dict.fromkeys(integers, size),
            least=least,
            pinned="every token goes to all of them" if least >= channels else None,
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
