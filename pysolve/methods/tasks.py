"""What is to be fitted of each layer: a study's correlations on the channels that stay, and back again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pysolve.correlations import Correlations, Indices, all_but, group_columns
from pysolve.forms import Codebook, Form, Integers, LowRank
from pysolve.layer.layer_fit import LayerFit
from pysolve.methods.menu import Chosen, Task
from pysolve.methods.study import Study
from pysolve.methods.weights import weight_name
from pysolve.nn.cut.cuts import kept_entries
from pysolve.nn.gathering.recurrent import bias_of
from pysolve.nn.graph.branches import Kept, Layer, layer_values
from pysolve.nn.layer_kinds import inputs_first
from pysolve.nn.layer_matrix import channels, taps
from pysolve.nn.running import as_tensor
from pysolve.nn.state import all_names
from pysolve.plan import Collapse, Plan, Site, tensor_name


@dataclass(frozen=True, eq=False)
class Left:
    """What stays of a network's weights.

    Parameters
    ----------
    cuts : {layer: Kept}
        Of layers that are fitted.
    places : {name: tensor}
        Of other weights that lose something, such as embeddings and grouped convolutions: the flat indices of
        their entries, in the shape that these leave.
    """

    cuts: Mapping[str, Kept] = field(default_factory=dict)
    places: Mapping[str, Tensor] = field(default_factory=dict)


def left_of(study: Study, keep: Mapping[Site, Indices]) -> Left:
    """What stays of the weights with these channels of the sites that lose some."""
    tensors = {weight_name(study.model, name): name for name in study.weights if name not in study.layers}
    steps = tuple(Collapse(site, kept) for site, kept in keep.items() if len(kept) < site.channels)
    places = kept_entries(study.model, Plan(steps), tensors) if steps and tensors else {}
    return Left(cuts_of(keep, study.layers), {tensors[name]: one for name, one in places.items()})


def cuts_of(keep: Mapping[Site, Indices], layers: Mapping[str, Layer]) -> dict[str, Kept]:
    """Inputs and outputs that stay of every layer that reads or writes one of the sites.

    Parameters
    ----------
    keep : {Site: (k,) int array}
    layers : {name: Layer}
        Writers that are not among them (embeddings) have no cut.
    """
    lost: dict[tuple[str, int], list[Indices]] = {}
    for site, kept in keep.items():
        gone = all_but(site.channels, kept)
        for name in (*site.readers, *site.writers):
            if name in layers:
                inputs, outputs = channels(layers[name].module)
                if name in site.readers:
                    lost.setdefault((name, 0), []).append(site.columns_of(name, inputs)[gone].ravel())
                if name in site.writers:
                    lost.setdefault((name, 1), []).append(site.rows_of(name, outputs)[gone].ravel())

    def left(name: str, side: int) -> Indices:
        parts = lost.get((name, side), ())
        return all_but(channels(layers[name].module)[side], np.concatenate(parts) if parts else ())

    return {name: Kept(left(name, 0), left(name, 1)) for name in dict.fromkeys(name for name, _ in lost)}


def task_of(
    study: Study,
    left: Left,
    name: str,
    correlations: Mapping[str, Correlations] | None = None,
    *,
    prior: LayerFit | None = None,
    previous: LayerFit | None = None,
) -> Task:
    """A layer to fit, with all of its outputs but for those that are cut; on the study's correlations.

    Of inputs so small that nothing can be fitted to them, nothing is known.
    """
    W, cuts = study.matrix(name), left.cuts
    known = (study.correlations if correlations is None else correlations).get(name)
    if name in left.places:
        places = left.places[name].flatten(1).numpy()
        if known is None:
            return Task(name, W.ravel()[places], None, np.arange(len(places)), previous, places)
        rows, columns = _block(places, W.shape[1])
        own = _known(_restricted(known, columns, rows))
        return Task(name, W.ravel()[places], own, rows, previous, places)
    outputs = np.arange(len(W))
    if name not in cuts:
        return Task(name, W, _known(known), outputs, previous)
    layer = study.layers[name].module
    columns = group_columns(cuts[name].inputs, taps(layer))
    outputs = cuts[name].outputs
    W = W[:, columns] if prior is None else prior.weight
    W = W[outputs] if len(W) > len(outputs) else W
    own = None if known is None else _restricted(known, columns, outputs)
    return Task(name, W, _known(own), outputs, previous)


def _block(places: Indices, width: int) -> tuple[Indices, Indices]:
    """Rows and columns that entries at these places of a matrix have."""
    return places[:, 0] // width, places[0] % width


def _known(found: Correlations | None) -> Correlations | None:
    return None if found is None or found.vanishes else found


def tasks_of(study: Study, chosen: Chosen) -> dict[str, Task]:
    """Every weight that takes another form, on the channels that stay and the original's inputs."""
    left = left_of(study, chosen.keep)
    return {name: task_of(study, left, name) for name in chosen.fits}


def values_of(
    study: Study, state: Mapping[str, Tensor], left: Left, name: str, found: LayerFit
) -> dict[str, Tensor]:
    """New parameters of a layer, or a bare parameter, in their original shapes."""
    layer = study.layers.get(name)
    if layer is None:
        tensor = weight_name(study.model, name)
        old, new = state[tensor], as_tensor(found.weight).to(state[tensor])
        if name in left.places:
            places = left.places[name].to(old.device)
            new = old.clone().put_(places, new.reshape(places.shape))
        values = dict.fromkeys(all_names(study.model, tensor), new.reshape(old.shape))
        own = bias_of(study.model, tensor)
        if own is not None and found.bias is not None:
            values[own] = as_tensor(found.bias).to(state[own])
            if name in left.places:
                rows = torch.from_numpy(_block(left.places[name].flatten(1).numpy(), old[0].numel())[0])
                values[own] = state[own].index_put((rows.to(old.device),), values[own])
        return values
    bias = found.bias if layer.takes_bias else None
    return layer_values(state, layer, left.cuts.get(name), found.weight, bias)


def names_of(study: Study, name: str) -> Iterator[str]:
    """State-dict names of what ``values_of`` gives a layer, or a bare parameter."""
    layer, weight = study.layers.get(name), weight_name(study.model, name)
    yield from [weight] if layer is not None else all_names(study.model, weight)
    if layer is None and (own := bias_of(study.model, weight)) is not None:
        yield own
    if layer is not None and layer.module.bias is not None:
        yield tensor_name(name, "bias")
    elif layer is not None and layer.mean is not None:
        yield layer.mean


def _restricted(found: Correlations, columns: Indices, rows: Indices) -> Correlations:
    """Correlations of some inputs with some outputs."""
    return replace(found.of_outputs(rows), group_size=1).restrict(columns)


def shaped(study: Study, left: Left, name: str, form: Form) -> Form | None:
    """A form in the shape of the weight that it stands for; None where it has no place."""
    if isinstance(form, LowRank) and name in study.layers and inputs_first(study.layers[name].module):
        return LowRank(form.inner.swapaxes(0, 1), form.outer.swapaxes(0, 1))
    if not isinstance(form, Codebook | Integers):
        return form
    if name not in study.layers:
        shape = left.places.get(name, study.weights[name]).shape
        return form.with_codes(form.codes.reshape(shape))
    layer = study.layers[name].module
    codes = form.codes.reshape(len(form.codes), -1, *layer.weight.shape[2:])
    if not inputs_first(layer):
        return form.with_codes(codes)
    # The rows of such a weight are inputs: scales of outputs have no place there.
    return form.with_codes(np.ascontiguousarray(codes.swapaxes(0, 1))) if isinstance(form, Codebook) else None
