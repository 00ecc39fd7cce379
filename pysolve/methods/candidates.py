"""Which layers of a network could become two, what each rank would cost, and what it does to the network."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pysolve.correlations import Array, Correlations
from pysolve.layer.reduced_rank import FactoredLayer, error_curve, factor_layer
from pysolve.methods.layerwise import Material, study_layers, weighted_layers
from pysolve.methods.ranks import Candidate, most_useful, probed_ranks
from pysolve.methods.study import LEAST_SAMPLES, PROBE_SAMPLES, PROBED_ERRORS
from pysolve.nn.calibration import first_samples, samples_in, take
from pysolve.nn.divergence import Divergence, mean_divergence, run
from pysolve.nn.evaluate import layer_macs, macs
from pysolve.nn.graph.branches import Layer, layer_values
from pysolve.nn.layer_matrix import matrix
from pysolve.nn.layers.factored import CONVOLUTIONS, Factored, empty
from pysolve.nn.profile import latencies, layer_inputs
from pysolve.nn.sensitivity import sensitivities

STRUCTURES = ("auto", "channel", "spatial")
# Samples that layers are timed on.
_TIMED = 64
# Samples that sensitivities are taken on.
_SENSED = 256


@dataclass(frozen=True, eq=False)
class Candidates:
    """A network's layers: those that could become two, and why the others cannot.

    Parameters
    ----------
    model : nn.Module
    layers : {name: layer}
        All that have weights and are not ignored.
    open : {name: Candidate}
    against : {name: str}
        Grows as candidates fall.
    plain : bool
        Whether weights are approximated without regard to what they read.
    divergence : callable
    material : Material, optional
        What the data say.
    inputs : {name: tensor}
        What each layer reads for some samples.
    notes : tuple of str
    spare : {name: Candidate}
        The other structure of a convolution.
    seconds : {name: (int, float, float)}
        The largest rank that was timed; what the layer took as it is and as two.
    metrics : {name: (h, h) array}
        What errors at a layer's outputs do to the network's.
    harms : {name: {rank: float}}
        Divergence with that layer alone at that rank.
    """

    model: nn.Module
    layers: Mapping[str, Any]
    open: dict[str, Candidate]
    against: dict[str, str]
    plain: bool
    divergence: Divergence
    material: Material | None
    inputs: Mapping[str, Tensor]
    notes: tuple[str, ...]
    metrics: Mapping[str, Array] = field(default_factory=dict)
    spare: dict[str, Candidate] = field(default_factory=dict)
    seconds: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    harms: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def held(self) -> Any:
        """One batch that no fit has seen, if there are data."""
        return None if self.material is None else self.material.calibration.held[0]

    def correlations(self, name: str) -> Correlations | None:
        """What a layer's error is measured by; None: by its weights."""
        return None if self.plain or self.material is None else self.material.correlations[name]

    def factored(
        self, one: Candidate, W: Array, correlations: Correlations | None, rank: int
    ) -> FactoredLayer:
        """A layer at a rank."""
        shape: Any = {"kernel": one.kernel, "spatial": one.spatial, "metric": self.metrics.get(one.name)}
        return factor_layer(W, correlations, rank, **shape)


def study_ranks(
    model: nn.Module,
    batches: Iterable[Any] | None,
    *,
    plain: bool,
    structure: str,
    ignore: Sequence[str],
    divergence: Divergence,
    progress: bool,
) -> Candidates:
    """One pass over the data, if there are any: every layer's errors and costs at every rank that pays.

    Parameters
    ----------
    plain : bool
        Approximate weights without regard to what they read.
    model, batches, structure, ignore, divergence, progress
        As ``low_rank`` has them.
    """
    layers, notes = weighted_layers(model, ignore)
    against = {name: why for name, layer in layers.items() if (why := _reason_against(name, layer))}
    material, inputs, counts = None, {}, dict[str, float]()
    if batches is not None:
        material = study_layers(model, batches, [*layers], gathered=not plain, progress=progress)
        held = material.calibration.held[0]
        example = take(held, 0, 2)
        inputs = layer_inputs(model, layers, take(held, 0, _TIMED))
        counts = {name: count / samples_in(example) for name, count in layer_macs(model, example).items()}
        notes += material.notes
        blind = set() if plain else layers.keys() - material.correlations.keys()
        against |= {name: "what it reads is not seen" for name in blind - against.keys()}
    metrics = {} if plain or material is None else _metrics(material, layers.keys() - against.keys())
    found = Candidates(model, layers, {}, against, plain, divergence, material, inputs, tuple(notes), metrics)
    for name in layers:
        if name not in against:
            several = _candidates(found, name, counts.get(name, 0.0), structure)
            if several:
                found.open[name] = several[0]
                if len(several) > 1:
                    found.spare[name] = several[1]
            else:
                against[name] = "too small for any rank to pay"
    return found


def harm_curve_of(found: Candidates, one: Candidate) -> Array:
    """(most + 2,) divergence to expect at rank 0 … most, and of the layer as it is; from some ranks."""
    assert found.material is not None
    harms = found.harms.setdefault(one.name, {})
    ranks = [rank for rank in probed_ranks(one, PROBED_ERRORS) if rank not in harms]
    if ranks:
        count = max(LEAST_SAMPLES, PROBE_SAMPLES // max(1, len(found.open) * len(PROBED_ERRORS)))
        probes = first_samples(found.material.calibration.held, count)
        originals = list(run(found.model, probes))
        for rank in ranks:
            outputs = run(found.model, probes, _alone(found, one, rank))
            sizes = [*map(samples_in, probes)]
            harms[rank] = mean_divergence(originals, outputs, sizes, found.divergence)
    return one.curve(harms)


def seconds_of_both(layer: Any, one: Candidate, rank: int, x: Tensor) -> tuple[float, float]:
    """What a layer takes for its inputs as it is, and at this rank; medians of calls by turns."""
    two = Factored.from_form(layer, empty(layer, rank, spatial=one.spatial))
    before, after = latencies((copy.deepcopy(layer), two), x)
    return before.median, after.median


def weights_of(layer: Any) -> Array:
    """The layer's weight as a matrix, in double precision."""
    return np.asarray(matrix(layer).double().cpu().numpy())


def _reason_against(name: str, layer: nn.Module) -> str | None:
    """Why a layer cannot become two, if it cannot."""
    if not name:
        return "it is the whole network: put it into an nn.Sequential"
    if type(layer) is NonDynamicallyQuantizableLinear:
        return "attention calls its function, not the layer"
    if type(layer) not in (nn.Linear, *CONVOLUTIONS):
        return f"a {type(layer).__name__} cannot be factored"
    return "it has groups" if getattr(layer, "groups", 1) > 1 else None


def _candidates(found: Candidates, name: str, count: float, structure: str) -> list[Candidate]:
    """A layer in both structures, that first which loses less at half the cost; ``count``: its MACs."""
    layer, known = found.layers[name], found.correlations(name)
    kernel, metric = tuple(layer.weight.shape[2:]), found.metrics.get(name)
    flat = len(kernel) != 2 or min(kernel) == 1
    ways = [False] if flat or structure == "channel" else [True] if structure == "spatial" else [False, True]
    several = []
    for spatial in ways:
        parts = _costs(layer, spatial, count, found.inputs.get(name))
        most = most_useful(*parts)
        error = error_curve(weights_of(layer), known, most, kernel=kernel, spatial=spatial, metric=metric)
        several.append(Candidate(name, kernel, spatial, error, *parts))
    paying = [one for one in several if one.most]
    return sorted(paying, key=lambda one: float(one.error[(one.most + 1) // 2]))


def _metrics(material: Material, names: Collection[str]) -> dict[str, Array]:
    """Of each layer what an error means to the network, and as much again of the error itself.

    Without the second part, which counts all outputs alike, errors go where the first order sees none.
    """
    layers = {name: material.layers[name].module for name in names}
    samples = first_samples(material.calibration.kept, _SENSED)
    pieces = [take(b, i, i + _TIMED) for b in samples for i in range(0, samples_in(b), _TIMED)]
    found = sensitivities(material.model, layers, pieces)
    return {name: S + np.eye(len(S)) for name, S in found.items()}


def _costs(
    layer: Any, spatial: bool, count: float, x: Tensor | None
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """What one rank costs in the inner and the outer layer, and what the weight costs now."""
    form, weight = empty(layer, 1, spatial=spatial), layer.weight
    sizes = [form.inner.size, form.outer.size, weight.numel()]
    # Without data nothing is known of positions: MACs count one.
    calls = [float(size) for size in sizes]
    if x is not None and count:
        two = layer_macs(Factored.from_form(layer, form), x)
        calls = [count * n / macs(layer, x) for n in (two["inner"], two["outer"], macs(layer, x))]
    parts = (
        {"params": float(n), "macs": calls[i], "bytes": float(n * weight.itemsize)}
        for i, n in enumerate(sizes)
    )
    inner, outer, dense = parts
    return inner, outer, dense


def _alone(found: Candidates, one: Candidate, rank: int) -> dict[str, Tensor]:
    """The network's values with one layer at a rank, fitted on the original's inputs."""
    assert found.material is not None
    # Layers called twice, or never, have no place in the graph; their weights alone can be fitted.
    layer = found.material.layers.get(one.name) or Layer(one.name, found.layers[one.name], calls=0)
    known = found.correlations(one.name)
    W = weights_of(layer.module)
    fitted = found.factored(one, W, known, rank)
    bias = fitted.bias if layer.takes_bias else None
    return layer_values(found.model.state_dict(), layer, None, fitted.weight, bias)
