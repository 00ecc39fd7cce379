"""Every set of channels of a network that can shrink, tested by removing some, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
from torch import nn
from torch.fx import Node

from pysolve.errors import PysolveError
from pysolve.nn.batches.items import example_of
from pysolve.nn.cut.bare import own_tensors
from pysolve.nn.graph.classes import ROLES, Classes, Member
from pysolve.nn.graph.experts import expert_sites
from pysolve.nn.graph.export import Graph, trace
from pysolve.nn.graph.head_dims import head_dims
from pysolve.nn.graph.labels import label_channels
from pysolve.nn.graph.residual import with_branches
from pysolve.nn.graph.trials import COUNTED, WRITTEN, proven_sites, trial
from pysolve.nn.layers.attention import ignored_in_opened, opened
from pysolve.nn.plain import plain_network
from pysolve.nn.running import (
    Batch,
    Ignored,
    evaluating,
    few_samples,
    find_layer,
    find_matching,
    forward,
    sample_leaves,
    with_leaves,
)
from pysolve.plan import Indices, Site, tensor_name

# Tokens of each text that sites are tried on.
WORDS = 32


def find_sites(
    model: nn.Module,
    example_inputs: Batch,
    *,
    ignore: Iterable[Ignored] = (),
    attention: bool = False,
    head_dims: bool = False,
) -> list[Site]:
    """Find all sets of channels that can be removed together, and say of all others what keeps them.

    The network is traced with torch.export, every channel that a layer makes gets a label, and the labels
    run through the graph: channels whose labels meet belong together. What survives is tried out: random
    halves of the channels of all sites are removed, and the smaller network must equal the masked one, and
    train if the network does. Where that fails it is tried again with integers of modules that shrink with
    the channels, and with whole rows or columns of views that lay channels out in a grid. The network itself
    is not changed.

    Parameters
    ----------
    model : nn.Module
    example_inputs : one batch
        A tensor, a tuple or list whose first item is the input, or a mapping of keyword arguments, on the
        network's device; or a DataLoader, or a Dataset of single samples, of which the first batch is taken.
    ignore : iterable of str, types or modules
        Layers whose channels must stay, with all that they hold: names, patterns ``"re:…"`` that match whole
        names, types, or the layers themselves.
    attention : bool
        Take ``nn.MultiheadAttention``, which keeps its heads and its width otherwise, for layers ``q_proj``,
        ``k_proj``, ``v_proj`` and ``out_proj``; ``apply`` makes these of it where a plan names them.
    head_dims : bool
        Also the dimensions of attention heads, of all heads of a layer together, of torch's attention too.
        They overlap with whole heads: a plan may cut one of both in each layer.

    Returns
    -------
    list of Site
        In the order in which the network first uses their writers, whole experts and dimensions of heads
        last. Sites that cannot shrink say why in ``pinned``.

    Raises
    ------
    PysolveError
        When torch.export cannot follow the network: names the line.
    LayerNotFoundError
        When a name or pattern in ``ignore`` belongs to no layer.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> [(site.name, site.channels, site.pinned) for site in ps.find_sites(model, torch.randn(10, 16))]
    [('0 → 2', 64, None), ('2 → nothing', 4, "the network's output")]
    """
    model, example_inputs = plain_network(model), example_of(example_inputs)
    if attention or head_dims:
        ignore, model = sorted(ignored_in_opened(model, ignore)), opened(model)
    find_matching(model, ignore)
    few = few_samples(example_inputs)
    if few is not example_inputs:
        # A batch size may be written into the code.
        with suppress(PysolveError):
            return sites_in(model, trace(model, few, free_sizes=False), few, ignore=ignore, heads=head_dims)
    graph = trace(model, example_inputs, free_sizes=False)
    return sites_in(model, graph, example_inputs, ignore=ignore, heads=head_dims)


def sites_in(
    model: nn.Module, graph: Graph, batch: Batch, *, ignore: Iterable[Ignored] = (), heads: bool = False
) -> list[Site]:
    """``find_sites`` of a network that has been traced with this batch; ``heads``: with their dimensions."""
    layers = find_matching(model, ignore)
    ignored = layers | {
        tensor_name(one, leaf) for one in layers for leaf in own_tensors(find_layer(model, one))
    }
    training, some = _in_training(model, graph, batch), _first_words(model, batch)

    def proven(lines: Mapping[Node, int]) -> tuple[list[Site], list[Node]]:
        classes = label_channels(model, graph, training, lines)
        found = proven_sites(model, [_ignoring(site, ignored) for site in sites_of(classes)], some)
        return found, _guilty_grids(classes, found)

    best, guilty = proven({})
    # Whether the code fixes the rows of a grid or its columns is not in the graph.
    for line in (0, -1) if guilty else ():
        found, _ = proven(dict.fromkeys(guilty, line))
        best = max(best, found, key=_freed)
    free = [site for site in best if site.pinned is None]
    problem = trial(model, some)
    best = with_branches(best, model, graph, some, problem)
    experts = [_ignoring(site, ignored) for site in expert_sites(model, graph, problem, free)]
    # The logits of a router, which its softmax mixes.
    logits = {name for site in experts if site.pinned is None for name in site.writers}
    best = [site for site in best if site.pinned is None or not logits.issuperset(site.writers)]
    dims = head_dims(model, graph, some, sites_of, problem) if heads else ()
    return [*best, *experts, *(_ignoring(site, ignored) for site in dims)]


def _guilty_grids(classes: Classes, sites: Sequence[Site]) -> list[Node]:
    """Views that lay channels out in a grid which cannot lose some of them just so."""
    written = [site for site in sites if (site.pinned or "").startswith((WRITTEN, COUNTED))]
    members = {member.layer: member for member in classes.members if member.role == "writers"}
    rows = [members[name].labels[site.rows[name]] for site in written for name in site.writers]
    held = {root for labels in rows for root in classes.roots[labels].ravel().tolist()}
    return [node for node, roots in classes.grids.items() if held & roots]


def _freed(sites: Sequence[Site]) -> int:
    """Channels of layers that can go."""
    return sum(site.rows[name].size for site in sites if site.pinned is None for name in site.writers)


def _first_words(model: nn.Module, batch: Batch) -> Batch:
    """The beginnings of long texts, if that is what a batch holds, and the network takes them.

    A trial on whole ones, with logits of all words for every token, takes a pass over the data for each site.
    """
    leaves = sample_leaves(batch)
    lengths = {tuple(leaf.shape[1:]) for leaf in leaves.values()}
    words = any(not leaf.is_floating_point() for leaf in leaves.values())
    if not words or len(lengths) != 1 or len(size := lengths.pop()) != 1 or size[0] <= WORDS:
        return batch
    few = with_leaves(batch, {i: leaf[:, :WORDS] for i, leaf in leaves.items()})
    try:
        with evaluating(model):
            forward(model, few)
    # Whatever the network's own code raises.
    except Exception:
        return batch
    return few


def _in_training(model: nn.Module, graph: Graph, batch: Batch) -> Graph | None:
    """The graph in training mode, if there are parameters that the graph in evaluation mode does not use."""
    state = dict(model.named_parameters(remove_duplicate=False))
    if {*map(id, state.values())} == {id(state[name]) for name in graph.used & state.keys()}:
        return None
    with suppress(PysolveError):
        return trace(model, batch, free_sizes=False, training=True)
    return None


def sites_of(classes: Classes) -> list[Site]:
    """Classes of labels with the same layers, and as many channels in each, as one site."""
    # Writers first, so that the first entry of a class is a row of its first writer.
    members = sorted(classes.members, key=lambda member: ROLES.index(member.role))
    number, index, root = _entries(members, classes.roots)
    starts = np.flatnonzero(np.diff(root, prepend=-1))
    groups: dict[tuple[bytes, str | None], list[int]] = {}
    for start, stop in pairwise([*starts.tolist(), len(root)]):
        if members[number[start]].role == "writers":
            key = (number[start:stop].tobytes(), classes.pinned.get(int(root[start])))
            groups.setdefault(key, []).append(start)
    found = []
    for (signature, pinned), begins in groups.items():
        layers = np.frombuffer(signature, dtype=np.intp)
        table = index[np.array(begins)[:, None] + np.arange(len(layers))]
        table = table[np.argsort(table[:, 0])]
        if len(table) == 1:
            pinned = classes.first.get(int(root[begins[0]]), "it is a single channel")
        found.append((layers[0], table[0, 0], _site([members[i] for i in layers], table, pinned, classes)))
    return [site for _, _, site in sorted(found, key=lambda one: one[:2])]


def _entries(members: Sequence[Member], roots: Indices) -> tuple[Indices, Indices, Indices]:
    """Member, index in it and class of every channel of every layer, class by class, member by member."""
    sizes = [len(member.labels) for member in members]
    number = np.repeat(np.arange(len(members)), sizes)
    index = np.concatenate([np.arange(size) for size in sizes] or [np.arange(0)])
    labels = [member.labels.numpy() for member in members]
    root = roots[np.concatenate(labels or [np.arange(0)])]
    order = np.lexsort((index, number, root))
    return number[order], index[order], root[order]


def _site(layers: Sequence[Member], table: Indices, pinned: str | None, classes: Classes) -> Site:
    """A site from the members that the columns of a table of channels belong to."""
    tables: dict[Member, list[int]] = {}
    for column, member in enumerate(layers):
        tables.setdefault(member, []).append(column)
    writers, passed, readers, norms = (
        tuple(member.layer for member in tables if member.role == role) for role in ROLES
    )
    part = [
        one.layer
        for one, own in tables.items()
        if one.role == "norms" and table[:, own].size < len(one.labels)
    ]
    if pinned is None and part:
        pinned = f"{part[0]} scales by the mean of these channels and of others"
    if pinned is None and not readers:
        pinned = "nothing reads these channels"
    parts = [(member, np.ascontiguousarray(table[:, columns])) for member, columns in tables.items()]
    return Site(
        channels=len(table),
        writers=writers,
        readers=readers,
        passed=passed,
        rows={member.layer: part for member, part in parts if member.role in ("writers", "passed")},
        columns={member.layer: part for member, part in parts if member.role == "readers"},
        pinned=pinned,
        norms=tuple(classes.norms[name] for name in norms),
    )


def _ignoring(site: Site, ignored: set[str]) -> Site:
    named = [
        name
        for name in (*site.writers, *site.passed, *site.readers)
        if {name, name.partition(":")[0]} & ignored
    ]
    return replace(site, pinned=f"`{named[0]}` is to be ignored") if named else site
