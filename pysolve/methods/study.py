"""One export of a network and one pass over its data: all that is known before anything is chosen."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pysolve.correlations import Array, Correlations
from pysolve.errors import PysolveError
from pysolve.nn.calibration import Calibration, calibrate, peek
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.graph.branches import Layer, find_layers
from pysolve.nn.graph.export import Graph, trace_once
from pysolve.nn.graph.sites import sites_in
from pysolve.nn.layer_matrix import LAYERS, channels, groups, matrix
from pysolve.nn.layers.masking import masks_of
from pysolve.nn.layers.sparse import SparseWeight
from pysolve.nn.running import Batch, as_array, find_matching
from pysolve.nn.slicing import WEIGHTED
from pysolve.plan import Site


@dataclass(frozen=True)
class Options:
    """What every verb takes, besides its own arguments.

    Parameters
    ----------
    ignore : sequence of str
        Layers to leave alone: names, or patterns as ``re:…``.
    divergence : callable
        From the original's and another output to how far they are apart, averaged over samples.
    memory : int, optional
        Bytes that the refit may hold in activations; by default half of what is free.
    seed : int
    progress : bool
    """

    ignore: Sequence[str] = ()
    divergence: Divergence = kl_divergence
    memory: int | None = None
    seed: int = 0
    progress: bool = True


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
        readers = {self.layers[name] for site in self.free for name in site.readers}
        return frozenset(layer.name for layer in readers if layer.calls == 1 and not layer.takes_bias)

    def walks(self, name: str) -> bool:
        """Whether a layer can be refitted on the way through the graph, or without one on what is known."""
        layer = self.layers.get(name)
        return layer is not None and (layer.calls == 1 if self.graph else name in self.correlations)

    def matrix(self, name: str) -> Array:
        """A weight as the matrix M of  y = M x + b, in double precision; else its ``flatten(1)``."""
        if name in self.layers:
            return np.asarray(matrix(self.layers[name].module).double().cpu().numpy())
        return np.asarray(as_array(self.weights[name].flatten(1)), np.float64)


def weight_name(model: nn.Module, name: str) -> str:
    """What the state dict calls the weight of a layer, or a bare parameter."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return f"{name}.weight".lstrip(".") if name in modules else name


def study(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    options: Options,
    *,
    weights: Mapping[str, Tensor] | None = None,
    sites: Sequence[Site] | bool = False,
    gather: bool = True,
    trace: bool = True,
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
        Without, the network does not run, and the first batch is there to measure on.
    notes : sequence of str

    Raises
    ------
    PysolveError
        Sites are looked for in a network that cannot be traced.
    """
    weights = weights or {}
    if batches is None:
        return Study(model, options, weights=weights, notes=tuple(notes))
    clock = Clock()
    first, batches = peek(batches)
    if not trace:
        only = Calibration(0, [first], [first])
        return Study(model, options, weights=weights, calibration=only, notes=tuple(notes))
    graph, nodes, found, why = _traced(model, first, sites, options.ignore)
    seen = {layer.name: layer for layer in nodes.values()}
    named = [name for site in found for name in (*site.readers, *site.writers)]
    layers = {layer.name: layer for layer in _unseen(model, [*named, *([] if graph else weights)])} | seen
    clock.stage("find")
    readers = [name for site in found if site.pinned is None for name in site.readers]
    wanted = [
        *readers,
        *(name for name in weights if (gather or not graph) and _is_gathered(layers.get(name), graph)),
    ]
    calibration, correlations = calibrate(
        model,
        batches,
        first,
        graph,
        nodes,
        [*dict.fromkeys(wanted)],
        memory=options.memory,
        progress=options.progress,
    )
    clock.stage("gather")
    if why and weights:
        notes = (
            *notes,
            f"layers were fitted on the original's inputs, for the network cannot be exported: {why}",
        )
    return Study(
        model, options, graph, layers, weights, found, correlations, calibration, tuple(notes), clock.seconds
    )


def weights_of(
    model: nn.Module, ignore: Sequence[str] = (), kinds: tuple[type[nn.Module], ...] = WEIGHTED
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of layers that can be changed, by the layers' names, and notes of those that cannot.

    Raises
    ------
    PysolveError
        When weights are masked.
    """
    if masks_of(model):
        raise PysolveError("the network's weights are masked: call remove_masks on it first.")
    ignored = find_matching(model, ignore)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    found: dict[str, Tensor] = {}
    notes: list[str] = []
    for name, module in model.named_modules():
        if name in ignored:
            continue
        if isinstance(module, SparseWeight):
            notes.append(f"{name} is left alone: it is sparse; nn.to_dense changes that")
        if not isinstance(module, kinds):
            continue
        own = module._parameters.get("weight")
        if own is None:
            notes.append(f"{name} is left alone: its weight is computed from others")
        elif owners[id(own)] > 1:
            notes.append(f"{name} is left alone: another layer shares its weight")
        else:
            found[name] = own
    return found, notes


def _is_gathered(layer: Layer | None, graph: Graph | None) -> bool:
    """Whether what a layer reads can be seen; attention calls its last layer's function, not the layer."""
    once = layer is not None and (graph is None or layer.calls == 1)
    return once and layer is not None and type(layer.module) is not NonDynamicallyQuantizableLinear


def _traced(
    model: nn.Module, first: Batch, sites: Sequence[Site] | bool, ignore: Sequence[str]
) -> tuple[Graph | None, dict[Node, Layer], Sequence[Site], str]:
    """The graph, its layers, the sites, and why there is no graph."""
    given = () if isinstance(sites, bool) else tuple(sites)
    try:
        graph, few = trace_once(model, first)
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


def _unseen(model: nn.Module, names: Iterable[str]) -> Iterator[Layer]:
    """Layers as they are when no graph shows what follows them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in dict.fromkeys(names):
        module = modules.get(name)
        if isinstance(module, LAYERS) and groups(module) == 1:
            yield Layer(name, module, calls=0)


def widths(study: Study, site: Site) -> dict[str, int]:
    """Input channels of a site's readers."""
    return {name: channels(study.layers[name].module)[0] for name in site.readers}


class Clock:
    """Seconds that stages took, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def stage(self, name: str) -> None:
        """Write down what has passed since the last stage."""
        now = time.perf_counter()
        self.seconds[name], self.last = self.seconds.get(name, 0.0) + now - self.last, now
