"""Sites whose channels are dimensions of attention heads: the same of all heads of a layer go together.

They overlap with the sites of whole heads, and a plan may cut one of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn
from torch.fx import Node

from pysolve.nn.cut.bare import is_stack
from pysolve.nn.graph.bisection import Problem, faults
from pysolve.nn.graph.calls import product_of, stored
from pysolve.nn.graph.classes import Attended, Classes, Member, squashed
from pysolve.nn.graph.export import Graph
from pysolve.nn.graph.integers import choices, counting, integers_read
from pysolve.nn.graph.labels import label_channels
from pysolve.nn.graph.trials import half
from pysolve.nn.running import Batch, find_layer
from pysolve.plan import Attention, Indices, Site, tensor_name

# From sites to the sites that labels make of them.
SitesOf = Callable[[Classes], list[Site]]


def head_dims(
    model: nn.Module, graph: Graph, batch: Batch, sites_of: SitesOf, problem: Problem
) -> list[Site]:
    """The sites of dimensions of heads, with what follows their number; pinned where they do not work.

    Parameters
    ----------
    model : nn.Module
    graph : Graph
    batch : one batch
    sites_of : callable
        From classes of labels to sites.
    problem : callable
        From steps to what is wrong with the network that loses their channels; None if nothing is.
    """
    classes = label_channels(model, graph, inner=True)
    every = [*_described(graph, classes, sites_of(classes))]
    found = [site for site in every if site.pinned is None]
    proven, read = dict[int, Site](), integers_read(model, batch, trains=False) if found else {}
    # Layers repeat each other: what works for one is tried for all that are left.
    for i, site in enumerate(found):
        if i in proven:
            continue
        rng, problems = np.random.default_rng(0), list[str]()
        for number in range(len([*_variants(model, site, read)])):
            offered = {
                j: [*_variants(model, found[j], read)] for j in range(i, len(found)) if j not in proven
            }
            tried = {j: half(one[number], rng) for j, one in offered.items() if number < len(one)}
            if (wrong := problem([tried[i]])) is not None:
                problems.append(wrong)
                continue
            proven |= {j: step.site for j, step in faults(tried, problem)[0].items()}
            break
        else:
            proven[i] = replace(site, pinned=problems[0])
    return [*(proven[i] for i in sorted(proven)), *(site for site in every if site.pinned is not None)]


def _described(graph: Graph, classes: Classes, sites: Sequence[Site]) -> Iterator[Site]:
    """Sites that hold dimensions of heads, with the rows of each head; pinned where none holds them all."""
    writers = [member for member in classes.members if member.role == "writers"]
    readers = {one.layer for one in classes.members if one.role == "readers"}
    heads: dict[int, list[Attention]] = {}
    for attended in classes.attended:
        one = _attention(graph, attended, writers)
        if one is None or one.output not in readers:
            continue
        owner = _owner(sites, one)
        columns = None if owner is None else sites[owner].columns.get(one.output)
        groups = [_shared(table) for table in (one.keys, one.values)]
        if owner is None:
            yield _pinned(one, _why_apart(sites, one))
        elif columns is None or columns.size != one.queries.size:
            yield _pinned(one, f"{one.output} reads more than the results of these heads")
        elif (keys := groups[0]) is None or (values := groups[1]) is None or keys.shape != values.shape:
            yield _pinned(one, "heads that share keys or values are not next to each other")
        else:
            outputs = np.sort(columns.ravel()).reshape(one.queries.shape)
            own = heads.setdefault(owner, [])
            # Layers that run several times are scaled once.
            if all(_layers(one) != _layers(other) for other in own):
                own.append(replace(one, keys=keys, values=values, outputs=outputs))
    for i, several in heads.items():
        yield replace(sites[i], attention=tuple(several))


def _pinned(one: Attention, why: str) -> Site:
    """The dimensions of one attention, all of which stay, read as no columns of their own."""
    d, writers = one.queries.shape[1], tuple(dict.fromkeys((one.query, one.key, one.value)))
    # Values may have other dimensions than queries, so that equal blocks are not theirs.
    columns = {one.output: np.empty((d, 0), dtype=np.intp)}
    return Site(d, writers, (one.output,), columns=columns, pinned=why, attention=(one,))


def _why_apart(sites: Sequence[Site], one: Attention) -> str:
    """Why no site holds all dimensions of some heads."""
    parts = [
        site for site in sites if one.query in site.rows and np.isin(one.queries, site.rows[one.query]).any()
    ]
    said = [site.pinned for site in parts if site.pinned is not None]
    why = "some dimensions of these heads do not go like others, as where positions turn a part of each head"
    return f"{why}: {said[0]}" if said else why


def _layers(one: Attention) -> tuple[str, ...]:
    return one.query, one.key, one.value, one.output


def _attention(graph: Graph, attended: Attended, writers: Sequence[Member]) -> Attention | None:
    """Layers that make queries, keys and values, and their rows by head; None where several make one."""
    found = [_located(labels, writers) for labels in (attended.query, attended.key, attended.value)]
    output = _reader(graph, attended.node)
    if output is None or not all(found):
        return None
    (query, queries), (key, keys), (value, values) = (one for one in found if one)
    # Queries are scaled, which matrices in one parameter are not.
    if is_stack(query):
        return None
    return Attention(query, key, value, output, queries, keys, values, queries)


def _located(labels: Tensor, writers: Sequence[Member]) -> tuple[str, Indices] | None:
    """The layer that makes all of these channels, and (heads, d) of its rows."""
    core, d = squashed(labels), labels.shape[-1]
    # Learnt queries of one head may have neither samples nor heads.
    if labels.ndim < 3 or core.numel() != core.shape[-3] * d or core.min() < 0:
        return None
    # Of keys that all heads share there is one row.
    table = np.broadcast_to(core.reshape(-1, d).numpy(), (labels.shape[-3], d))
    for member in writers:
        start, stop = int(member.labels.min()), int(member.labels.max())
        if start <= table.min() and table.max() <= stop:
            return member.layer, np.asarray(table - start, dtype=np.intp)
    return None


def _shared(table: Indices) -> Indices | None:
    """(G, d) rows without repetitions, where heads in a row share them; None where others do."""
    _, first = np.unique(table[:, 0], return_index=True)
    own = table[np.sort(first)]
    same = len(table) % len(own) == 0 and np.array_equal(np.repeat(own, len(table) // len(own), 0), table)
    return own if same else None


def _reader(graph: Graph, node: Node) -> str | None:
    """The layer that reads what attention gives."""
    while len(users := [*node.users]) == 1:
        call = product_of(users[0])
        if call is not None and call.x is node and isinstance(call.weight, Node):
            name = graph.parameters.get(stored(call.weight)[0])
            return None if name is None else name.rpartition(".")[0]
        node = users[0]
    return None


def _owner(sites: Sequence[Site], one: Attention) -> int | None:
    """The site that holds all dimensions of some heads."""
    for i, site in enumerate(sites):
        parts = ((one.query, one.queries), (one.key, one.keys), (one.value, one.values))
        if all(name in site.rows and np.isin(rows, site.rows[name]).all() for name, rows in parts):
            return i
    return None


def _variants(model: nn.Module, site: Site, read: Mapping[str, int]) -> Iterator[Site]:
    """The site with what may follow the size of its heads: the scale of scores, and integers."""
    offers = counting(site, read)
    names = [*choices({path.rpartition(".")[2] for path in offers}), set[str]()]
    for scales in _scales(model, site):
        heads = tuple(replace(one, scale=s) for one, s in zip(site.attention, scales, strict=True))
        for chosen in names:
            integers = {path: each for path, each in offers.items() if path.rpartition(".")[2] in chosen}
            yield replace(site, attention=heads, integers=integers)


def _scales(model: nn.Module, site: Site) -> Iterator[tuple[str | None, ...]]:
    """Where 1/√d may be held: in an attribute of the module around the layers, in the code, or nowhere."""
    held = [_held(model, one) for one in site.attention]
    if all(held):
        yield tuple(held)
    yield tuple("" for _ in held)
    yield tuple(None for _ in held)


def _held(model: nn.Module, one: Attention) -> str:
    """The attribute of the module around queries that is 1/√d; "" where none or several are."""
    owner = one.query.rpartition(".")[0]
    values = vars(find_layer(model, owner)).items()
    wanted = one.queries.shape[1] ** -0.5
    names = [name for name, value in values if type(value) is float and value == wanted]
    return tensor_name(owner, names[0]) if len(names) == 1 else ""
