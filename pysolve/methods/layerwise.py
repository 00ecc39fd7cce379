"""Layers of a network changed one after the other, each fitted on what those before it leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pysolve.correlations import Array, Correlations
from pysolve.errors import PysolveError
from pysolve.nn.calibrate import calibrate, peek
from pysolve.nn.calibration import Calibration, samples_in, usable
from pysolve.nn.graph.branches import Layer, find_layers, layer_values
from pysolve.nn.graph.export import Graph, trace
from pysolve.nn.layer_matrix import LAYERS, groups, matrix
from pysolve.nn.layers.masking import masks_of
from pysolve.nn.layers.sparse import SparseWeight
from pysolve.nn.lockstep import Sampling, refit
from pysolve.nn.running import as_array, find_matching
from pysolve.nn.slicing import WEIGHTED
from pysolve.solve.least_squares import refit as refit_near


class Fitted(Protocol):
    """New weights of a layer: (h, d) and (h,) arrays, and the share of the outputs' energy that is lost."""

    @property
    def weight(self) -> Array: ...
    @property
    def bias(self) -> Array | None: ...
    @property
    def error(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Refitted:
    """A layer whose weights are all free, as ``Fitted`` has it."""

    weight: Array
    bias: Array | None
    error: float


# A layer's new weights, from its name, its matrix and its correlations.
FitLayer = Callable[[str, Array, Correlations], Fitted]


@dataclass(frozen=True, eq=False)
class Material:
    """What is known of a network whose layers are to be changed.

    Parameters
    ----------
    model : nn.Module
    graph : Graph, optional
        None where it cannot be exported.
    layers : {name: Layer}
        Those that can be refitted.
    calibration : Calibration
    correlations : {layer: Correlations}
        In the original network, of the layers that were asked for.
    notes : tuple of str
    """

    model: nn.Module
    graph: Graph | None
    layers: dict[str, Layer]
    calibration: Calibration
    correlations: dict[str, Correlations]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """New values of a network's state dict, by name, the error of each layer, and the samples it took."""

    values: dict[str, npt.NDArray[Any]]
    errors: dict[str, float]
    samples: int


def weighted_layers(
    model: nn.Module, ignore: Sequence[str] = (), kinds: tuple[type[nn.Module], ...] = WEIGHTED
) -> tuple[dict[str, Any], list[str]]:
    """Layers of some kinds whose weights can be changed, by name, and notes of those that cannot.

    Raises
    ------
    PysolveError
        When weights are masked.
    """
    if masks_of(model):
        raise PysolveError("the network's weights are masked: call remove_masks on it first.")
    ignored = find_matching(model, ignore)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    layers, notes = {}, []
    for name, module in model.named_modules():
        if name in ignored:
            continue
        if isinstance(module, SparseWeight):
            notes.append(f"{name} is left alone: it is sparse; nn.dense.to_dense changes that")
        if not isinstance(module, kinds):
            continue
        own = module._parameters.get("weight")
        if own is None:
            notes.append(f"{name} is left alone: its weight is computed from others")
        elif owners[id(own)] > 1:
            notes.append(f"{name} is left alone: another layer shares its weight")
        else:
            layers[name] = module
    return layers, notes


def study_layers(
    model: nn.Module, batches: Iterable[Any], names: Sequence[str], *, gathered: bool, progress: bool = True
) -> Material:
    """One pass over the data: what can be refitted, and the correlations of some layers.

    Parameters
    ----------
    model : nn.Module
    batches : iterable of batches
    names : sequence of str
        Layers to change.
    gathered : bool
        Whether their correlations are needed beforehand.
    progress : bool
    """
    first, batches = peek(batches)
    notes: tuple[str, ...] = ()
    graph: Graph | None = None
    try:
        graph = trace(model, first)
        nodes = find_layers(graph, model)
        found = {layer.name: layer for layer in nodes.values() if layer.calls == 1}
    except PysolveError as error:
        nodes, found = {}, {name: layer for name in names if (layer := _unseen(model, name)) is not None}
        notes = (f"layers were fitted on the original's inputs, for the network cannot be exported: {error}",)
    layers = {name: found[name] for name in names if name in found}
    # Attention calls its last layer's function, not the layer.
    seen = [name for name, one in layers.items() if type(one.module) is not NonDynamicallyQuantizableLinear]
    if graph is None:
        layers = {name: layers[name] for name in seen}
    wanted = seen if gathered or graph is None else []
    calibration, sums = calibrate(model, batches, first, graph, nodes, wanted, progress=progress)
    return Material(model, graph, layers, calibration, sums, notes)


def _unseen(model: nn.Module, name: str) -> Layer | None:
    """A layer as it is when no graph shows what follows it."""
    module = model.get_submodule(name)
    return Layer(name, module, calls=0) if isinstance(module, LAYERS) and groups(module) == 1 else None


def reconstruct(
    material: Material,
    fit_layer: FitLayer,
    *,
    always: Collection[str] | None = None,
    values: Mapping[str, Tensor] | None = None,
    weights: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Reconstructed:
    """New weights and biases of the layers, front to back, on the pruned network's inputs.

    Where there is no graph to walk through, on the original's.

    Parameters
    ----------
    material : Material
    fit_layer : callable
        Called once or more for a layer; what it gives last counts.
    always : collection of str, optional
        Layers to change in any case, by default all; the others only where their inputs change.
    values : {state-dict name: tensor}, optional
        What changes besides.
    weights : bool
        Otherwise only biases are fitted: layers that have none keep the rest of what ``fit_layer`` gives.
    seed : int
        Of the choice of rows.
    progress : bool
    """
    errors: dict[str, float] = {}

    def fit(name: str, correlations: Correlations, intercept: bool) -> tuple[Array, Array | None]:
        W = matrix(material.layers[name].module).double().cpu().numpy()
        layer = fit_layer(name, W, correlations if intercept else _without_sums(correlations))
        errors[name] = layer.error
        return layer.weight, layer.bias if intercept else None

    graph, layers, state = material.graph, material.layers, material.model.state_dict()
    new = dict(values or {})
    if graph is None:
        for name, correlations in material.correlations.items():
            if always is not None and name not in always:
                continue
            layer = layers[name]
            new |= layer_values(state, layer, None, *fit(name, correlations, layer.takes_bias))
        return Reconstructed(_arrays(new), errors, material.calibration.seen)
    batches = usable(graph, material.calibration.kept)
    if not batches:
        raise PysolveError(
            "the network's code takes batches of one size alone, and none is left whole without the samples "
            "that are held back: give more batches."
        )
    sampling = Sampling(passes=int(weights), seed=seed)
    new = refit(
        graph,
        material.model,
        batches,
        {},
        fit,
        values=new,
        only=layers.keys(),
        always=layers.keys() if always is None else always,
        sampling=sampling,
        progress=progress,
    )
    return Reconstructed(_arrays(new), errors, sum(map(samples_in, batches)))


def near_old(W: Array, correlations: Correlations) -> Refitted:
    """Least squares, held a little to the old weights."""
    M, bias = refit_near(correlations, np.arange(W.shape[1]), W)
    return Refitted(M, bias, correlations.share_lost(M, bias))


def _without_sums(found: Correlations) -> Correlations:
    """Correlations that centring does not change."""
    return replace(found, x_sum=np.zeros_like(found.x_sum), y_sum=np.zeros_like(found.y_sum))


def _arrays(values: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: as_array(value) for name, value in values.items()}
