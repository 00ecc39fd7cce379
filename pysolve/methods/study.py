"""One export of a network and one pass over its data: all that is known before anything is chosen."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from pysolve.correlations import Array, Correlations
from pysolve.errors import DataError, PysolveError
from pysolve.methods.goal import Options
from pysolve.nn.bare import is_stack
from pysolve.nn.calibration import Calibration, calibrate, laid_out, of_other_sizes, peek
from pysolve.nn.evaluate import parameters
from pysolve.nn.gather import reads_more
from pysolve.nn.graph.branches import Layer, find_layers
from pysolve.nn.graph.export import Graph, trace, trace_once
from pysolve.nn.graph.routes import routed
from pysolve.nn.graph.sites import sites_in
from pysolve.nn.layer_kinds import EMBEDDINGS, WEIGHTED
from pysolve.nn.layer_matrix import LAYERS, channels, groups, matrix
from pysolve.nn.layers.masking import masks_of, permanent_by
from pysolve.nn.layers.sparse import SparseWeight
from pysolve.nn.refusal import output_of
from pysolve.nn.running import (
    Batch,
    Ignored,
    as_array,
    evaluating,
    few_samples,
    find_matching,
)
from pysolve.nn.stacks import stack_correlations, stack_inputs, stack_notes
from pysolve.plan import Site


@dataclass(frozen=True)
class Skipped:
    """A weight that is left alone: its name, why, and its number of parameters."""

    name: str
    why: str
    params: int


@dataclass(frozen=True, eq=False)
class Study:
    """What is known of a network.

    Parameters
    ----------
    model : nn.Module
        The original; never changed.
    options : Options
    graph : Graph, optional
        None where there are no data, or the network cannot be exported.
    layers : {name: Layer}
        Linear layers and ungrouped convolutions, with what the graph shows around them.
    weights : {name: tensor}
        Weights that may take another form: of layers, by the layer's name, and bare parameters by their own.
    sites : sequence of Site
    correlations : {layer: Correlations}
    calibration : Calibration, optional
        None without data.
    left : tuple of Skipped
        Weights that take no other form.
    notes : tuple of str
    seconds : {stage: float}
    """

    model: nn.Module
    options: Options
    graph: Graph | None = None
    layers: Mapping[str, Layer] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    sites: Sequence[Site] = ()
    correlations: Mapping[str, Correlations] = field(default_factory=dict)
    calibration: Calibration | None = None
    left: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def free(self) -> list[Site]:
        """Sites that can shrink."""
        return [site for site in self.sites if site.pinned is None]

    @property
    def held(self) -> list[Batch]:
        """The selection set: samples that no fit has seen, on which sizes are chosen."""
        return [] if self.calibration is None else self.calibration.held

    @property
    def apart(self) -> list[Batch]:
        """Samples that neither a fit nor a choice has seen, for the report."""
        return [] if self.calibration is None else self.calibration.apart

    @property
    def new_biases(self) -> frozenset[str]:
        """Layers without a bias that may be given one: those that can lose inputs."""
        readers = {self.layers[name] for site in self.free for name in site.readers if name in self.layers}
        return frozenset(layer.name for layer in readers if layer.calls == 1 and not layer.takes_bias)

    def walks(self, name: str) -> bool:
        """Whether a layer can be refitted on the way through the graph, or without one on what is known."""
        layer = self.layers.get(name)
        return layer is not None and (layer.calls == 1 if self.graph else name in self.correlations)

    def fits(self, name: str) -> bool:
        """Whether a layer can be fitted to data: on the way, or on what all of its calls read."""
        return self.walks(name) or name in self.correlations

    def matrix(self, name: str) -> Array:
        """A weight as the matrix M of  y = M x + b, in double precision; else its ``flatten(1)``."""
        if name in self.layers:
            return np.asarray(matrix(self.layers[name].module).double().cpu().numpy())
        return np.asarray(as_array(self.weights[name].flatten(1)), np.float64)


def weight_name(model: nn.Module, name: str) -> str:
    """What the state dict calls the weight of a layer, or a bare parameter."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return name
    return f"{name}.weight".lstrip(".")


def study(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    options: Options,
    *,
    weights: Mapping[str, Tensor] | None = None,
    sites: Sequence[Site] | bool = False,
    gather: bool = True,
    trace: bool = True,
    left: Sequence[Skipped] = (),
    notes: Sequence[str] = (),
) -> Study:
    """Trace the network, find its sites, and gather correlations while the data stream by once.

    Parameters
    ----------
    model : nn.Module
    batches : iterable of batches, optional
    options : Options
    weights : {name: tensor}, optional
        Of ``weights_of``: what may take another form.
    sites : sequence of Site, or bool
        Whether channels may go: those of these sites, or of all that are found.
    gather : bool
        Whether correlations of the weights' layers are needed beforehand, beside those of sites' readers.
    trace : bool
        Without, the first batch is there to measure on, and nothing is fitted.
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
    clock = Clock()
    first, batches = laid_out(model, *peek(batches, options.transform))
    if not trace:
        with evaluating(model):
            output_of(model, first)
        return replace(base, calibration=Calibration(0, [first], [first]))
    graph, nodes, found, why = _traced(model, first, sites, options.ignore)
    seen = {layer.name: layer for layer in nodes.values()}
    named = [name for site in found for name in (*site.readers, *site.writers)]
    layers = {layer.name: layer for layer in _unseen(model, [*named, *([] if graph else weights)])} | seen
    clock.stage("find")
    readers = [name for site in found if site.pinned is None for name in site.readers if not is_stack(name)]
    # What the walk through the graph cannot fit on the way.
    apart = {nodes[node].name for node in routed(graph) if node in nodes} if graph else set()
    asked = {name for name in weights if gather or name in apart}
    wanted = [*readers, *(name for name in weights if _is_gathered(layers.get(name), graph, name in asked))]
    calibration, correlations = calibrate(
        model,
        batches,
        first,
        graph,
        nodes,
        [*dict.fromkeys(wanted)],
        memory=options.memory,
        double=[
            name
            for site in found
            for name in site.readers
            if name in layers and reads_more(site, name, layers[name].module)
        ],
        progress=options.progress,
    )
    correlations |= stack_correlations(model, graph, calibration.kept, found)
    base = replace(base, notes=(*base.notes, *stack_notes(found)))
    clock.stage("gather")
    unseen = [name for name in dict.fromkeys(wanted) if name not in correlations]
    if unseen:
        base = replace(base, notes=(*base.notes, no_samples(unseen)))
        found = [_reached(site, correlations) for site in found]
    if graph and any(of_other_sizes(graph, batch) for batch in calibration.kept):
        graph, more_layers = _widened(model, first, graph)
        layers |= more_layers
        clock.stage("find")
    if why and weights:
        more = f"layers were fitted on the original's inputs, for the network cannot be exported: {why}"
        base = replace(base, notes=(*base.notes, more))
    return replace(
        base,
        graph=graph,
        layers=layers,
        sites=found,
        correlations=correlations,
        calibration=calibration,
        seconds=clock.seconds,
    )


def weights_of(
    model: nn.Module, ignore: Sequence[Ignored] = (), kinds: tuple[type[nn.Module], ...] = WEIGHTED
) -> tuple[dict[str, Tensor], list[Skipped]]:
    """Weights of layers of some kinds, by the layers' names, and all other matrices, which are left alone.

    Raises
    ------
    PysolveError
        When weights are masked.
    """
    if masks_of(model):
        raise PysolveError("the network's weights are masked: call remove_masks on it first.")
    ignored, modules = find_matching(model, ignore), dict(model.named_modules())
    owned = [p for module in modules.values() for _, p in module.named_parameters(recurse=False)]
    owners = Counter(map(id, owned))
    found: dict[str, Tensor] = {}
    left: list[Skipped] = []
    for name, module in modules.items():
        if name in ignored or isinstance(module, ParametrizationList):
            continue
        own = module._parameters.get("weight")
        if isinstance(module, SparseWeight):
            left.append(Skipped(name, "it is sparse; nn.to_dense changes that", parameters(module)))
            continue
        if is_parametrized(module) or (isinstance(module, (*WEIGHTED, *EMBEDDINGS)) and own is None):
            why = f"its weight is computed from others: {permanent_by(module)}"
            left.append(Skipped(name, why, parameters(module)))
            continue
        for leaf, value in module.named_parameters(recurse=False):
            full = name if leaf == "weight" else f"{name}.{leaf}".lstrip(".")
            if value.ndim < 2 or not value.numel() or not value.is_floating_point():
                continue
            if value is not own or not isinstance(module, kinds):
                left.append(Skipped(full, f"a weight of {type(module).__name__}", value.numel()))
            elif owners[id(value)] > 1:
                share = value.numel() // owners[id(value)]
                left.append(Skipped(full, "another layer shares its weight", share))
            else:
                found[name] = value
    return found, left


def reasons(left: Sequence[Skipped], shown: int = 5) -> str:
    """Names of weights that are left alone, and why, to go on after a sentence; "" where there are none."""
    names = [f"{one.name or 'the network'} ({one.why})" for one in left]
    more = [f"{len(names) - shown} more"] if len(names) > shown else []
    return f": {', '.join([*names[:shown], *more])}" if left else ""


def no_samples(names: Sequence[str]) -> str:
    """What becomes of layers whose inputs nothing is known of, for the report."""
    return (
        f"no sample reached {', '.join(names)}: nothing is fitted there, and weights stay as they are or are "
        "pruned and rounded by themselves"
    )


def _reached(site: Site, correlations: Mapping[str, Correlations]) -> Site:
    """The site, pinned where no sample has reached any of its readers."""
    if site.pinned is not None or any(name in correlations for name in site.readers):
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
    model: nn.Module, first: Batch, sites: Sequence[Site] | bool, ignore: Sequence[Ignored]
) -> tuple[Graph | None, dict[Node, Layer], Sequence[Site], str]:
    """The graph, its layers, the sites, and why there is no graph."""
    given = () if isinstance(sites, bool) else tuple(sites)
    try:
        graph, few = trace_once(model, first)
    except DataError:
        raise
    except PysolveError as error:
        if sites is True:
            raise
        return None, {}, given, str(error)
    return (
        graph,
        find_layers(graph, model),
        sites_in(model, graph, few, ignore=ignore) if sites is True else given,
        "",
    )


def _widened(model: nn.Module, first: Batch, graph: Graph) -> tuple[Graph, dict[str, Layer]]:
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


def widths(study: Study, site: Site) -> dict[str, int]:
    """Input channels of a site's readers."""
    stacks = {name: stack_inputs(study.model, name) for name in site.readers if is_stack(name)}
    return {n: stacks[n] if n in stacks else channels(study.layers[n].module)[0] for n in site.readers}


class Clock:
    """Seconds that stages took, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def stage(self, name: str) -> None:
        """Write down what has passed since the last stage."""
        now = time.perf_counter()
        self.seconds[name], self.last = self.seconds.get(name, 0.0) + now - self.last, now
