"""Every set of channels of a network that can shrink, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
from torch import nn

from pysolve.errors import PysolveError
from pysolve.nn.graph.classes import ROLES, Classes, Member
from pysolve.nn.graph.export import Graph, trace
from pysolve.nn.graph.labels import label_channels
from pysolve.nn.graph.trial import prove
from pysolve.nn.running import Batch, few_samples, find_matching
from pysolve.plan import Indices, Site


def find_sites(model: nn.Module, example_inputs: Batch, *, ignore: Iterable[str] = ()) -> list[Site]:
    """Find all sets of channels that can be removed together, and say of all others what keeps them.

    The network is traced with torch.export, every channel that a layer makes gets a label, and the labels
    run through the graph: channels whose labels meet belong together. What survives is tried out: random
    halves of the channels of all sites are removed, and the smaller network must equal the masked one.
    The network itself is not changed.

    Parameters
    ----------
    model : nn.Module
    example_inputs : one batch
        A tensor, a tuple or list whose first item is the input, or a mapping of keyword arguments, on the
        network's device.
    ignore : iterable of str
        Names of layers whose channels must stay, or patterns ``"re:…"`` that match whole names.

    Returns
    -------
    list of Site
        In the order in which the network first uses their writers. Sites that cannot shrink say why in
        ``pinned``.

    Raises
    ------
    PysolveError
        When torch.export cannot follow the network: names the line.
    LayerNotFoundError
        When a name or pattern in ``ignore`` belongs to no layer.
    """
    find_matching(model, ignore)
    few = few_samples(example_inputs)
    if few is not example_inputs:
        # A batch size may be written into the code.
        with suppress(PysolveError):
            return sites_in(model, trace(model, few, free_sizes=False), few, ignore=ignore)
    return sites_in(model, trace(model, example_inputs, free_sizes=False), example_inputs, ignore=ignore)


def sites_in(model: nn.Module, graph: Graph, batch: Batch, *, ignore: Iterable[str] = ()) -> list[Site]:
    """``find_sites`` of a network that has been traced with this batch."""
    ignored = find_matching(model, ignore)
    sites = sites_of(label_channels(model, graph))
    return prove(model, [_ignoring(site, ignored) for site in sites], batch)


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
        found.append((layers[0], table[0, 0], _site([members[i] for i in layers], table, pinned)))
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


def _site(layers: Sequence[Member], table: Indices, pinned: str | None) -> Site:
    """A site from the members that the columns of a table of channels belong to."""
    tables: dict[Member, list[int]] = {}
    for column, member in enumerate(layers):
        tables.setdefault(member, []).append(column)
    names = {role: tuple(member.layer for member in tables if member.role == role) for role in ROLES}
    if pinned is None and not names["readers"]:
        pinned = "nothing reads these channels"
    parts = [(member, np.ascontiguousarray(table[:, columns])) for member, columns in tables.items()]
    return Site(
        channels=len(table),
        **names,
        rows={member.layer: part for member, part in parts if member.role != "readers"},
        columns={member.layer: part for member, part in parts if member.role == "readers"},
        pinned=pinned,
    )


def _ignoring(site: Site, ignored: set[str]) -> Site:
    named = [name for name in (*site.writers, *site.passed, *site.readers) if name in ignored]
    return replace(site, pinned=f"`{named[0]}` is to be ignored") if named else site
