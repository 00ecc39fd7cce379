"""``study``: one export of a network and its correlations, all that is known before anything is chosen."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.fx import Node
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pysolve.compressed import Compressed
from pysolve.correlations import Correlations
from pysolve.errors import DataError, PysolveError
from pysolve.methods.goal import Memory, Options, network_of, options_for, prepared
from pysolve.methods.study import Clock, Study, no_samples
from pysolve.methods.weights import Skipped, weights_of
from pysolve.nn.batches.items import Transform, check_batches
from pysolve.nn.batches.samples import laid_out, mixed, moved, on_device, peek
from pysolve.nn.cut.bare import is_stack
from pysolve.nn.cut.stacks import stack_correlations, stack_notes
from pysolve.nn.divergence import kl_divergence
from pysolve.nn.files.study_file import check_network
from pysolve.nn.files.sums import some_of
from pysolve.nn.files.sums_folder import network_checksums
from pysolve.nn.gathering.calibration import Calibration, calibrate
from pysolve.nn.gathering.gather import reads_more
from pysolve.nn.gathering.recurrent import gather_recurrent, recurrent_weights
from pysolve.nn.graph.branches import Layer, find_layers
from pysolve.nn.graph.export import Graph, trace, trace_once
from pysolve.nn.graph.routes import routed
from pysolve.nn.graph.sites import sites_in
from pysolve.nn.graph.sizes import fits, of_other_sizes
from pysolve.nn.layer_matrix import LAYERS, groups
from pysolve.nn.layers.attention import has_opened, opened
from pysolve.nn.progress import one_bar
from pysolve.nn.ranks import of_all_processes
from pysolve.nn.refusal import beside, check_many, output_of
from pysolve.nn.running import (
    Batch,
    Device,
    Ignored,
    device_of,
    evaluating,
    few_samples,
)
from pysolve.nn.threads import one_blas_thread
from pysolve.plan import Site


@one_blas_thread
@one_bar
def study(
    model: nn.Module | Compressed,
    batches: Iterable[Batch],
    *,
    ignore: Sequence[Ignored] = (),
    memory: Memory = None,
    checkpoint: str | os.PathLike[str] | None = None,
    transform: Transform | None = None,
    process_group: ProcessGroup | None = None,
    device: Device = None,
    progress: bool = True,
) -> Study:
    """Gather what any verb needs of a network, once: verbs then take the study in the place of batches.

    Sums of all Linear layers and ungrouped convolutions that run, and samples for refits and measurements, in
    one pass over the data, or in as many as ``memory`` asks for.

    Parameters
    ----------
    model : nn.Module or Compressed
    batches : iterable of batches
        As ``compress`` has them.
    ignore : sequence of str, types or modules
        Layers of which nothing is gathered.
    memory : int or str, optional
        Bytes that the call may take beyond the network, or words such as "4GiB".
    checkpoint : path, optional
        Folder where sums are put away about once a minute: a killed call with the same arguments goes on
        from there, with the same sums to the bit. Another network, and other batches, are refused.
    transform : callable, optional
        Makes inputs of an item of ``batches``.
    process_group, device
        As in ``compress``.
    progress : bool

    Returns
    -------
    Study
        ``save`` and ``Study.load`` keep it in one file; studies of the same network on other samples add up.

    Raises
    ------
    PysolveError
        ``memory`` is too little; the checkpoint is of another network.
    DataError
        The network refuses a batch; batches hold NaN, or differ from those of an earlier pass.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> found = ps.study(model, batches)
    >>> sorted(found.correlations)
    ['0', '2']
    >>> smaller = ps.compress(model, found, keep=0.5, latency=False)  # and so do the other verbs
    """
    check_batches(batches)
    _, network = network_of(model)
    options = options_for(
        network,
        ignore,
        kl_divergence,
        memory,
        0,
        progress,
        None,
        transform,
        True,
        process_group,
        device,
        checkpoint,
    )
    network, options = prepared(network, options)
    weights, left = weights_of(network, options.ignore)
    return studied(
        network,
        batches,
        options,
        weights=weights,
        sites=True,
        needed=False,
        branches=True,
        heads=True,
        left=left,
    )


def studied(
    model: nn.Module,
    batches: Iterable[Batch] | Study | None,
    options: Options,
    *,
    weights: Mapping[str, Tensor] | None = None,
    sites: Sequence[Site] | bool = False,
    needed: bool = True,
    gather: bool = True,
    trace: bool = True,
    experts: bool = False,
    branches: bool = False,
    heads: bool = False,
    left: Sequence[Skipped] = (),
    notes: Sequence[str] = (),
) -> Study:
    """Trace the network, find its sites, and gather correlations while the data stream by once.

    Parameters
    ----------
    model : nn.Module
    batches : iterable of batches, or Study, optional
        Of a study, its correlations and samples.
    options : Options
    weights : {name: tensor}, optional
        Of ``weights_of``: what may take another form.
    sites : sequence of Site, or bool
        Whether channels may go: those of these sites, or of all that are found.
    needed : bool
        Whether sites that are looked for are needed: otherwise there are none in a network that cannot be
        traced.
    gather : bool
        Whether correlations of the weights' layers are needed beforehand, beside those of sites' readers.
    trace : bool
        Without, the first batch is there to measure on, and nothing is fitted.
    experts : bool
        Whether whole experts may go, where sites are looked for.
    branches : bool
        Whether all channels of a residual branch may go.
    heads : bool
        Whether sites that are looked for are those of heads' dimensions as well.
    left : sequence of Skipped
    notes : sequence of str

    Raises
    ------
    DataError
        The network refuses a batch, or batches hold NaN, or other plain values than the first.
    PysolveError
        Sites are looked for in a network that cannot be traced.
    """
    weights = weights or {}
    base = Study(model, options, weights=weights, left=tuple(left), notes=tuple(notes))
    if batches is None:
        return base
    clock, known, doubt = Clock(), batches if isinstance(batches, Study) else None, ""
    if known is not None:
        if options.transform is not None:
            raise ValueError("a study holds what transform has made already: leave transform out.")
        if known.model is not model:
            same = opened(model) if has_opened(known.model) else model
            check_network(network_checksums(known.model), same, "the study")
        known = replace(known, calibration=known._gathered.on(options.device))
        first = next(iter([*known, *known.held]))
    else:
        first, batches = peek(batches, options.transform)
        first, batches = laid_out(model, moved(first, options.device), on_device(batches, options.device))
        check_many(model, first)
        doubt = mixed(model, first)
    ranks = options.ranks
    if ranks.size > 1:
        ranks.check_same("network", network_checksums(model))
        # Graphs and sites are those of one batch.
        first = moved(ranks.first(first), device_of(model))
    if not trace:
        with evaluating(model):
            output_of(model, first)
        return replace(base, calibration=Calibration(0, [first], [first]))
    with beside(first):
        graph, nodes, found, why = _traced(model, first, sites, options.ignore, needed, known, heads)
    found = [site for site in found if heads or not site.attention]
    if sites is True and not experts:
        found = [_whole(site) for site in found]
    if not branches:
        found = [replace(site, least=max(1, site.least)) for site in found]
    seen = {layer.name: layer for layer in nodes.values()}
    named = [name for site in found for name in (*site.readers, *site.writers)]
    layers = {layer.name: layer for layer in _unseen(model, [*named, *([] if graph else weights)])} | seen
    clock.stage("find")
    free = [site for site in found if site.pinned is None]
    readers = [name for site in free for name in site.readers if not is_stack(name)]
    heads_of = [one for site in free for one in site.attention]
    readers += [name for one in heads_of for name in (one.query, one.key, one.value) if name in layers]
    # What the walk through the graph cannot fit on the way.
    apart = {nodes[node].name for node in routed(graph) if node in nodes} if graph else set()
    asked = {name for name in weights if gather or name in apart}
    wanted = [*readers, *(name for name in weights if _is_gathered(layers.get(name), graph, name in asked))]
    wanted, said = [*dict.fromkeys(wanted)], ""
    if known is not None:
        calibration = known._gathered.within(graph, options.memory)
        correlations: Mapping[str, Correlations] = some_of(known.correlations, wanted)
    else:
        double = [
            name
            for site in found
            for name in site.readers
            if name in layers and reads_more(site, name, layers[name].module)
        ]
        with beside(first):
            calibration, correlations, said = calibrate(
                model,
                batches,
                first,
                graph,
                nodes,
                wanted,
                bound=options.memory,
                checkpoint=options.checkpoint,
                ranks=ranks,
                double=double,
                progress=options.progress,
            )
    stacked = stack_correlations(model, graph, calibration.kept, found)
    read = {name: name.partition(":")[0] for site in free for name in site.readers if is_stack(name)}
    gates = recurrent_weights(model).keys() & {*weights, *read.values()}
    known_gates = gather_recurrent(model, calibration.kept, gates)
    stacked |= known_gates | {name: known_gates[own] for name, own in read.items() if own in known_gates}
    if ranks.size > 1:
        stacked = of_all_processes(stacked, ranks)
    correlations = ChainMap(stacked, correlations) if stacked else correlations  # type: ignore[arg-type]
    base = replace(base, notes=(*base.notes, *stack_notes(found, known_gates)))
    clock.stage("gather")
    base = replace(base, notes=(*base.notes, *([said] if said else [])))
    unseen = [name for name in wanted if name not in correlations]
    if unseen:
        base = replace(base, notes=(*base.notes, no_samples(unseen)))
        found = [_reached(site, correlations) for site in found]
    if graph and any(ranks.counts(sum(of_other_sizes(graph, batch) for batch in calibration.kept))):
        graph, more_layers = widened(model, first, graph)
        layers |= more_layers
        clock.stage("find")
    if why and weights:
        more = f"layers were fitted on the original's inputs, for the network cannot be exported: {why}"
        base = replace(base, notes=(*base.notes, more))
    return replace(
        base,
        notes=(*base.notes, *([doubt] if doubt else [])),
        graph=graph,
        layers=layers,
        sites=found,
        correlations=correlations,
        calibration=calibration,
        seconds=clock.seconds,
    )


def _whole(site: Site) -> Site:
    """The site, pinned where its channels are whole experts."""
    if site.pinned is not None or site.router is None:
        return site
    return replace(site, pinned="whole experts go by compress and sweep alone")


def _reached(site: Site, correlations: Mapping[str, Correlations]) -> Site:
    """The site, pinned where no sample has reached any of its readers."""
    if (
        site.pinned is not None
        or site.router is not None
        or any(name in correlations for name in site.readers)
    ):
        return site
    return replace(site, pinned=f"no sample reached {', '.join(site.readers)}")


def _is_gathered(layer: Layer | None, graph: Graph | None, every: bool) -> bool:
    """Whether what a layer reads is to be seen beforehand: of all, or of those that no walk can refit.

    Attention calls the function of its last layer, not the layer.
    """
    if layer is None or type(layer.module) is NonDynamicallyQuantizableLinear:
        return False
    return graph is None or layer.calls > 1 or (every and layer.calls == 1)


def _traced(
    model: nn.Module,
    first: Batch,
    sites: Sequence[Site] | bool,
    ignore: Sequence[Ignored],
    needed: bool,
    known: Study | None,
    heads: bool,
) -> tuple[Graph | None, dict[Node, Layer], Sequence[Site], str]:
    """The graph, its layers, the sites, and why there is no graph; of a study, what it knows of them."""
    given: Sequence[Site] = () if isinstance(sites, bool) else tuple(sites)
    graph, few = _graph_of(known, model, first), few_samples(first)
    try:
        if graph is None:
            graph, few = trace_once(model, first)
    except DataError:
        raise
    except PysolveError as error:
        if sites is True and needed:
            raise
        return None, {}, given, str(error)
    if sites is True:
        given = _sites_of(known, graph, ignore) or sites_in(model, graph, few, ignore=ignore, heads=heads)
    return graph, find_layers(graph, model), given, ""


def _graph_of(known: Study | None, model: nn.Module, first: Batch) -> Graph | None:
    """The graph that a study has of this very network, for any number of samples like the first ones."""
    if known is None or known.graph is None or not known.graph.is_of(model):
        return None
    return known.graph if known.graph.takes_any_batch and fits(known.graph, first) else None


def _sites_of(known: Study | None, graph: Graph, ignore: Sequence[Ignored]) -> Sequence[Site]:
    """The sites that a study has found in its graph; none where whole experts are, which verbs differ in."""
    if known is None or graph is not known.graph or [*known.options.ignore] != [*ignore]:
        return ()
    return () if any(site.router is not None for site in known.sites) else known.sites


def widened(model: nn.Module, first: Batch, graph: Graph) -> tuple[Graph, dict[str, Layer]]:
    """A graph for batches of other sizes, too, and its layers; the graph as it is where none can be made."""
    with suppress(PysolveError):
        graph = trace(model, few_samples(first), every_size=True, fixed_sizes=False)
        return graph, {layer.name: layer for layer in find_layers(graph, model).values()}
    return graph, {}


def _unseen(model: nn.Module, names: Iterable[str]) -> Iterator[Layer]:
    """Layers as they are when no graph shows what follows them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in dict.fromkeys(names):
        module = modules.get(name)
        if isinstance(module, LAYERS) and groups(module) == 1:
            yield Layer(name, module, calls=0)
