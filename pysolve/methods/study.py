"""One pass over the data, and all that it tells: what could shrink, by which channels, and at what harm."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.fx import Node
from tqdm.auto import tqdm

from pysolve.correlations import Array, Correlations
from pysolve.errors import PysolveError
from pysolve.methods.choice import Choice, choose, harm_curve, site_problem
from pysolve.methods.offline import cuts_of, reader_values, refit_readers
from pysolve.nn.calibration import calibrate, peek
from pysolve.nn.calibration import Calibration, first_samples, samples_in
from pysolve.nn.divergence import Divergence, kl_divergence, mean_divergence, run
from pysolve.nn.graph.branches import Layer, find_layers
from pysolve.nn.graph.export import Graph, trace
from pysolve.nn.graph.sites import find_sites
from pysolve.nn.layer_matrix import LAYERS, channels, groups
from pysolve.nn.running import find_layer
from pysolve.plan import Indices, Site

# A method of ``select_channels``, or a score for each channel by the sites' names.
Select = str | Mapping[str, npt.ArrayLike]

# Errors, as shares of the outputs' energy, at which the harm of shrinking a site is measured.
PROBED_ERRORS = (0.003, 0.02, 0.1, 0.3)
# Work for measuring harm, in samples through the whole network; shared by all sites, so that it does not grow
# with the square of the depth. Fewer samples than the least tell too little.
PROBE_SAMPLES, LEAST_SAMPLES = 16384, 48


@dataclass(frozen=True, eq=False)
class Study:
    """What one pass over the data tells of a network.

    Parameters
    ----------
    model : nn.Module
        The original.
    graph : Graph
    layers : {name: Layer}
    sites, free : list of Site
        All sites, and those of them that can shrink.
    correlations : {reader: Correlations}
        Of the free sites' readers.
    choices, harms, spent : lists
        Of each free site: what to keep at every size, the divergence measured at some sizes, seconds spent.
    calibration : Calibration
    probes, originals : lists
        Samples held back that harm is measured on, in batches, and the original's outputs.
    divergence : callable
    seconds : {stage: float}
    """

    model: nn.Module
    graph: Graph | None
    layers: Mapping[str, Layer]
    sites: Sequence[Site]
    free: Sequence[Site]
    correlations: Mapping[str, Correlations]
    choices: list[Choice]
    harms: list[dict[int, float]]
    spent: list[float]
    calibration: Calibration
    probes: Sequence[Any]
    originals: Sequence[Any]
    divergence: Divergence
    seconds: Mapping[str, float]

    def widths(self, site: Site) -> dict[str, int]:
        """Input channels of a site's readers."""
        return {name: channels(self.layers[name].module)[0] for name in site.readers}

    def curve(self, s: int) -> Array:
        """Divergence to expect of free site s at every size, from what was measured so far."""
        measured = sorted(self.harms[s].items())
        return harm_curve(self.choices[s].error, [k for k, _ in measured], [harm for _, harm in measured])

    @property
    def new_biases(self) -> frozenset[str]:
        """Layers without a bias that may be given one: those that can lose inputs."""
        readers = {self.layers[name] for site in self.free for name in site.readers}
        return frozenset(layer.name for layer in readers if layer.calls == 1 and not layer.takes_bias)


def study(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    select: Select = "elimination",
    ignore: Sequence[str] = (),
    sites: Sequence[Site] | None = None,
    divergence: Divergence = kl_divergence,
    memory: int | None = None,
    progress: bool = True,
) -> Study:
    """Trace the network, find its sites, gather their readers' correlations, and measure what shrinking does.

    Parameters
    ----------
    As ``pysolve.compress`` has them.
    """
    clock = Clock()
    first, batches = peek(batches)
    graph, nodes, sites = _traced(model, first, sites, ignore)
    layers = {layer.name: layer for layer in [*_unseen(model, sites), *nodes.values()]}
    free = [site for site in sites if site.pinned is None]
    clock.stage("find")
    readers = list(dict.fromkeys(reader for site in free for reader in site.readers))
    calibration, correlations = calibrate(
        model, batches, first, graph, nodes, readers, memory=memory, progress=progress
    )
    clock.stage("gather")
    count = max(LEAST_SAMPLES, PROBE_SAMPLES // max(1, len(free) * len(PROBED_ERRORS)))
    probes = first_samples(calibration.held, count)
    originals = list(run(model, probes))
    found = Study(
        model,
        graph,
        layers,
        sites,
        free,
        correlations,
        choices=[],
        harms=[],
        spent=[],
        calibration=calibration,
        probes=probes,
        originals=originals,
        divergence=divergence,
        seconds={},
    )
    for s in tqdm(range(len(free)), "measure", unit="site", disable=None if progress else True):
        start = time.perf_counter()
        problem, left = site_problem(free[s], correlations, found.widths(free[s]))
        method = select if isinstance(select, str) else np.asarray(select[free[s].name], dtype=np.float64)
        found.choices.append(choose(free[s], problem, left, method))
        found.harms.append({})
        for share in PROBED_ERRORS:
            fitting = int(np.searchsorted(-found.choices[s].error, -share))
            measure(found, s, max(1, min(fitting, free[s].channels - 1)))
        found.spent.append(time.perf_counter() - start)
    clock.stage("measure")
    return replace(found, seconds=clock.seconds)


def measure(found: Study, s: int, k: int) -> float:
    """Divergence with free site s alone reduced to k channels, its readers refitted; measured once."""
    harms = found.harms[s]
    if k not in harms:
        harms[k] = 0.0 if k == found.free[s].channels else harm(found, s, found.choices[s].keep(k))
    return harms[k]


def harm(found: Study, s: int, kept: Indices) -> float:
    """Divergence with free site s alone reduced to the kept channels, its readers refitted."""
    site, keep = [found.free[s]], [kept]
    fits = refit_readers(site, keep, found.layers, found.correlations)
    cuts = cuts_of(site, keep, found.layers)
    values = reader_values(found.model.state_dict(), cuts, found.layers, fits)
    outputs = run(found.model, found.probes, values)
    return mean_divergence(found.originals, outputs, [*map(samples_in, found.probes)], found.divergence)


def _traced(
    model: nn.Module, first: Any, sites: Sequence[Site] | None, ignore: Sequence[str]
) -> tuple[Graph | None, dict[Node, Layer], Sequence[Site]]:
    if sites is None:
        graph = trace(model, first)
        return graph, find_layers(graph, model), find_sites(model, first, ignore=ignore)
    try:
        graph = trace(model, first)
    except PysolveError:
        return None, {}, list(sites)
    return graph, find_layers(graph, model), list(sites)


def _unseen(model: nn.Module, sites: Sequence[Site]) -> Iterator[Layer]:
    """The sites' layers as they are when no graph shows what follows them."""
    for name in dict.fromkeys(name for site in sites for name in (*site.readers, *site.writers)):
        module = find_layer(model, name)
        if isinstance(module, LAYERS) and groups(module) == 1:
            yield Layer(name, module, calls=0)


class Clock:
    """Seconds that stages took, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
