"""Every set of channels of a network that can shrink, tested by removing some, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from pysolve.errors import CollapseError, PysolveError
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.cut.bare import own_tensors
from pysolve.nn.cut.verify import mismatch
from pysolve.nn.graph.classes import ROLES, Classes, Member
from pysolve.nn.graph.experts import Problem, expert_sites
from pysolve.nn.graph.export import Graph, trace
from pysolve.nn.graph.head_dims import head_dims
from pysolve.nn.graph.integers import choices, counting, integers_read
from pysolve.nn.graph.labels import label_channels
from pysolve.nn.graph.residual import with_branches
from pysolve.nn.items import example_of
from pysolve.nn.outputs import tensors_of
from pysolve.nn.plain import plain_network
from pysolve.nn.refusal import code_line
from pysolve.nn.running import (
    Batch,
    Ignored,
    evaluating,
    few_samples,
    find_layer,
    find_matching,
    forward,
    in_training,
    sample_leaves,
    with_leaves,
)
from pysolve.nn.state import copy_of
from pysolve.plan import Collapse, Indices, Plan, Site, tensor_name

# Tokens of each text that sites are tried on.
WORDS = 32
# The code keeps channels: an error shows where, or nothing but other outputs.
_WRITTEN, _COUNTED = "a width is written into the code", "the code counts on all of these channels"


def find_sites(
    model: nn.Module, example_inputs: Batch, *, ignore: Iterable[Ignored] = (), head_dims: bool = False
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
    head_dims : bool
        Also the dimensions of attention heads, of all heads of a layer together. They overlap with whole
        heads: a plan may cut one of both in each layer.

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
        found = _proven(model, [_ignoring(site, ignored) for site in sites_of(classes)], some)
        return found, _guilty_grids(classes, found)

    best, guilty = proven({})
    # Whether the code fixes the rows of a grid or its columns is not in the graph.
    for line in (0, -1) if guilty else ():
        found, _ = proven(dict.fromkeys(guilty, line))
        best = max(best, found, key=_freed)
    free = [site for site in best if site.pinned is None]
    problem = _trial(model, some)
    best = with_branches(best, model, graph, some, problem)
    experts = [_ignoring(site, ignored) for site in expert_sites(model, graph, problem, free)]
    # The logits of a router, which its softmax mixes.
    logits = {name for site in experts if site.pinned is None for name in site.writers}
    best = [site for site in best if site.pinned is None or not logits.issuperset(site.writers)]
    dims = head_dims(model, graph, some, sites_of, problem) if heads else ()
    return [*best, *experts, *(_ignoring(site, ignored) for site in dims)]


def _trial(model: nn.Module, batch: Batch) -> Problem:
    """What is wrong with the network, and with one of random weights, when some channels are removed."""

    @cache
    def networks() -> tuple[list[nn.Module], bool]:
        return [model, _randomized(model, batch)], _trouble(copy_of(model), batch) is None

    def problem(steps: Sequence[Collapse]) -> str | None:
        found, trains = networks()
        problems = (_problem(network, steps, batch, trains) for network in found)
        return next((one for one in problems if one is not None), None)

    return problem


def _guilty_grids(classes: Classes, sites: Sequence[Site]) -> list[Node]:
    """Views that lay channels out in a grid which cannot lose some of them just so."""
    written = [site for site in sites if (site.pinned or "").startswith((_WRITTEN, _COUNTED))]
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


def _proven(model: nn.Module, sites: Sequence[Site], batch: Batch) -> list[Site]:
    """The same sites, with those pinned whose removal breaks the network.

    A random half of the channels of every free site is removed twice: in the network itself, and in a copy
    with random weights of unit gain, in which no effect is too small to be measured. A network that runs in
    training mode must still do so.
    """
    rng = np.random.default_rng(0)
    proven = list(sites)
    trains = any(site.pinned is None for site in sites) and _trouble(copy_of(model), batch) is None
    for network in (model, _randomized(model, batch)):
        steps = {i: _half(site, rng) for i, site in enumerate(proven) if site.pinned is None}
        if not steps or _problem(network, [*steps.values()], batch, trains) is None:
            continue
        problems = _faults(network, steps, {}, batch, trains)[1]
        if problems and mismatch(copy_of(model), copy_of(model), batch, seeds=(0, 1)):
            problems = dict.fromkeys(problems, "the network's outputs are random, and others without these")
        followed = _followed(network, proven, problems, batch, trains) if network is model else {}
        for i, problem in problems.items():
            proven[i] = followed[i] if i in followed else replace(proven[i], pinned=problem)
    return proven


def _followed(
    model: nn.Module, sites: Sequence[Site], problems: Mapping[int, str], batch: Batch, trains: bool
) -> dict[int, Site]:
    """Sites that work once integers of the network's own modules follow the cut, with these integers."""
    rng, found = np.random.default_rng(0), dict[int, Site]()
    written = [i for i, problem in problems.items() if problem.startswith((_WRITTEN, _COUNTED))]
    read = integers_read(model, batch, trains=trains) if written else {}
    offers = {i: counting(sites[i], read) for i in written}
    claims = Counter(path for offer in offers.values() for path in offer)
    for names in choices({path.rpartition(".")[2] for path in claims}):
        steps = {}
        for i in offers.keys() - found.keys():
            chosen = {
                path: each
                for path, each in offers[i].items()
                if claims[path] == 1 and path.rpartition(".")[2] in names
            }
            if chosen:
                steps[i] = _half(replace(sites[i], integers=chosen), rng)
        if len(steps) > 1 and _problem(model, [*steps.values()][:1], batch, trains):
            continue
        found |= {i: step.site for i, step in _faults(model, steps, {}, batch, trains)[0].items()}
    return found


def _half(site: Site, rng: np.random.Generator) -> Collapse:
    keep = rng.choice(site.channels, max(1, site.channels // 2), replace=False)
    return Collapse(site, np.sort(keep))


def _faults(
    model: nn.Module,
    steps: Mapping[int, Collapse],
    sound: Mapping[int, Collapse],
    batch: Batch,
    trains: bool,
) -> tuple[dict[int, Collapse], dict[int, str]]:
    """Steps that work together with sound ones, and the problems of the others, by bisection."""
    problem = _problem(model, [*sound.values(), *steps.values()], batch, trains) if steps else None
    if problem is None:
        return dict(steps), {}
    if len(steps) == 1:
        return {}, dict.fromkeys(steps, problem)
    items = list(steps.items())
    middle = len(items) // 2
    left, wrong = _faults(model, dict(items[:middle]), sound, batch, trains)
    right, more = _faults(model, dict(items[middle:]), {**sound, **left}, batch, trains)
    return {**left, **right}, {**wrong, **more}


def _problem(model: nn.Module, steps: Sequence[Collapse], batch: Batch, trains: bool) -> str | None:
    """Problem when these channels are removed, in training mode too if it ``trains``; None if none."""
    plan = Plan(tuple(steps))
    try:
        smaller = apply(model, plan)
    except CollapseError as error:
        return str(error)
    difference = mismatch(masked(model, plan), smaller, batch, taken=True)
    if difference is None:
        trouble = _trouble(smaller, batch) if trains else None
        return trouble and f"training needs these channels{trouble}"
    try:
        with evaluating(smaller):
            forward(smaller, batch)
    # Whatever the network's own code raises when its layers are narrower.
    except Exception as error:
        return f"{_WRITTEN}{_told(error)}"
    return f"{_COUNTED}: without some of them {difference}"


def _trouble(model: nn.Module, batch: Batch) -> str | None:
    """What a network raises in training mode, which changes its statistics; None if it runs."""
    try:
        with in_training(model):
            forward(model, batch)
    except Exception as error:
        return _told(error)
    return None


def _told(error: Exception) -> str:
    """The line of the network's code that raised an error, and its first line."""
    return f"{code_line(error)}: {next(iter(str(error).splitlines()), repr(error))}"


def _randomized(model: nn.Module, batch: Batch) -> nn.Module:
    """A copy with random weights of unit gain; the model itself where that gives no finite output."""
    network = copy_of(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.is_floating_point():
            values = torch.rand(parameter.shape, generator=generator) + 0.5
            if parameter.ndim > 1:
                values = torch.randn(parameter.shape, generator=generator)
                values *= (len(parameter) / max(1, parameter.numel())) ** 0.5
            parameter.data.copy_(values)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
    try:
        with evaluating(network):
            outputs = tensors_of(forward(network, batch))
    except Exception:
        return model
    finite = all(bool(output.isfinite().all()) for output in outputs)
    return network if finite else model
