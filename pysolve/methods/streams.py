"""Streams of RMS norms in their principal axes: channels that go are then directions of little variance.

The network is turned, not changed. With gains folded into the readers, x ↦ x / √(mean x² + ε) commutes with
any rotation Q of its channels: writers W become Qᵀ W and readers V become V diag(gain) Q. One Q serves the
whole stream, so that nothing is added, and the norms stay what they are.

References
----------
S. Ashkboos et al., SliceGPT: Compress large language models by deleting rows and columns, 2024.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import AnyArray, Array, Correlations, Indices
from pysolve.methods.study import Study, Turn
from pysolve.methods.weights import weight_name
from pysolve.nn.apply import untie
from pysolve.nn.bare import find_member
from pysolve.nn.evaluate import parameters
from pysolve.nn.gather import gather_reached
from pysolve.nn.gathered import own_outputs
from pysolve.nn.graph.branches import Layer, find_layers, read_by
from pysolve.nn.graph.export import Graph, trace_once
from pysolve.nn.graph.norms import norm_before
from pysolve.nn.layer_kinds import LINEAR, inputs_first, twins
from pysolve.nn.layer_matrix import LAYERS
from pysolve.nn.layers.base import weight_of
from pysolve.nn.outputs import tensors_of
from pysolve.nn.ranks import of_all_processes
from pysolve.nn.running import Batch, as_array, evaluating, find_layer, forward
from pysolve.nn.samples import take
from pysolve.nn.state import copy_of
from pysolve.nn.values import load
from pysolve.plan import Norm, Site, tensor_name

# Samples on which the turned network must equal the original, and to what share of its outputs.
_PROBED = 4
_EXACT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
# A gain below this share of the largest is none: nothing is read of that channel.
_SILENT = 1e-6
# A tied head is given a weight of its own where that adds less than this share of the parameters.
_UNTIED = 0.05
_TURNABLE = (*LINEAR, nn.Embedding)


def in_principal_axes(study: Study) -> Study:
    """The study of an equal network whose streams have their principal axes for channels.

    Of every stream through RMS norms: with z = x / √(mean x² + ε) and readers V, gains included,

        S = Σ E[z zᵀ] over norms,  A = Σ Vᵀ V / E‖V z‖² over readers,

    the axes are the eigenvectors of S^½ A S^½, largest first: of much variance that readers weigh. They span
    the stream where it has fewer directions than channels. (On a small decoder those of S alone cost 4 to 9 %
    more divergence.) A stream with other members than linear
    layers, embeddings and norms, or whose turned network does not equal the original, stays as it is; so does
    one with a tied head whose own weight would add much. The report says so.

    Returns
    -------
    Study
        Of the turned network, with correlations in its axes; ``turn`` holds the way to it.
    """
    for site in study.free:
        if site.norms and study.graph is not None:
            found = _turned(study, site)
            said = f"the channels of {site.name} were selected, not turned: {found}"
            study = replace(study, notes=(*study.notes, said)) if isinstance(found, str) else found
    return study


@dataclass(frozen=True, eq=False)
class _Stream:
    """A stream and the way to its axes.

    Parameters
    ----------
    site : Site
    gains : {reader: (channels,) array}
        Of the norm that it reads through.
    axes : (channels, channels) array
        Q, one axis a column.
    """

    site: Site
    gains: Mapping[str, Array]
    axes: Array

    def read(self, name: str, width: int) -> Array:
        """(d, d) matrix that turns a reader's inputs."""
        gain, columns = self.gains[name], self.site.columns_of(name, width)[:, 0]
        heard = np.abs(gain) > _SILENT * np.abs(gain).max()
        inverse = np.divide(1.0, gain, out=np.zeros_like(gain), where=heard)
        T = np.eye(width)
        T[np.ix_(columns, columns)] = self.axes.T * inverse
        return T


def _turned(study: Study, site: Site) -> Study | str:
    """The study with one stream in its axes, or why that is not possible."""
    weights = {norm.weight for norm in site.norms}
    norms = weights | {weight.removesuffix(".weight") for weight in weights}
    strangers = [name for name in (*site.readers, *site.writers, *site.passed) if name not in norms]
    strangers = [name for name in strangers if not isinstance(find_member(study.model, name), _TURNABLE)]
    if strangers:
        return f"{strangers[0]} is no linear layer"
    tied = [name for name in site.readers if find_member(study.model, name) in twins(study.model)]
    more = sum(weight_of(find_layer(study.model, name)).numel() for name in tied)
    if more > _UNTIED * parameters(study.model):
        return f"{tied[0]} would need a weight of its own"
    own = _untied(study, tied) if tied else study
    often = [name for name in site.readers if name not in own.layers or own.layers[name].calls != 1]
    if often:
        return f"{often[0]} does not run just once"
    stream = _stream(own, site)
    network, values = _network(own.model, stream)
    difference = _difference(study.model, network, take(study.held[0], 0, _PROBED))
    if not difference <= _EXACT.get(next(network.parameters()).dtype, 1e-5):
        return f"turned, its outputs would differ by {difference:.1e}"
    assert own.graph is not None
    found = _of(own, network, own.graph)
    turn = found.turn or Turn(study.model)
    turn = replace(turn, values={**turn.values, **values})
    return replace(found, correlations=_Turned(found.correlations, stream, found.layers), turn=turn)


def _untied(study: Study, tied: Sequence[str]) -> Study:
    """The study of the network with weights of their own for layers that share them, and what these read."""
    assert study.calibration is not None
    names = tuple(weight_name(study.model, name) for name in tied)
    network = untie(copy_of(study.model), names)
    graph, _ = trace_once(network, take(study.held[0], 0, 2))
    seen = gather_reached(network, study.calibration.kept, tied, full=False, progress=study.options.progress)
    known = {name: one for name, one in seen.items() if one is not None}
    known = of_all_processes(known, study.options.ranks) if study.options.ranks.size > 1 else known
    before = study.turn or Turn(study.model)
    return replace(
        _of(study, network, graph),
        correlations=ChainMap(known, study.correlations),  # type: ignore[arg-type]
        turn=replace(before, untied=(*before.untied, *names)),
    )


def _of(study: Study, network: nn.Module, graph: Graph) -> Study:
    """The study of another network of the same layers."""
    seen = {layer.name: layer for layer in find_layers(graph, network).values()}
    others = dict[str, Layer]()
    for name, layer in study.layers.items():
        module = network.get_submodule(name)
        if name not in seen and isinstance(module, LAYERS):
            others[name] = replace(layer, module=module)
    state = network.state_dict(keep_vars=True)
    weights = {name: state[weight_name(network, name)] for name in study.weights}
    return replace(study, model=network, graph=graph, layers={**others, **seen}, weights=weights)


def _stream(study: Study, site: Site) -> _Stream:
    """A stream with its axes."""
    assert study.graph is not None
    nodes = {layer.name: node for node, layer in find_layers(study.graph, study.model).items()}
    gains, counted = dict[str, Array](), set[Norm | None]()
    moments, weights = np.zeros((2, site.channels, site.channels))
    for name in site.readers:
        norm = norm_before(study.graph, read_by(nodes[name]), site.norms)
        gains[name] = np.ones(site.channels) if norm is None else _gain(study.model, site, norm)
        known = study.correlations.get(name)
        if known is None:
            continue
        columns = site.columns_of(name, len(known.xx))[:, 0]
        T = _Stream(site, gains, np.eye(site.channels)).read(name, len(known.xx))
        own = (T @ known.xx @ T.T)[np.ix_(columns, columns)] / known.count
        V = study.matrix(name)[:, columns] * gains[name]
        squares = V.T @ V
        weights += squares / max(float(np.vdot(squares, own)), np.finfo(float).tiny)
        moments += 0 if norm in counted else own
        counted.add(norm)
    values, vectors = np.linalg.eigh(moments)
    root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    axes = np.linalg.eigh(root @ weights @ root)[1][:, ::-1]
    return _Stream(site, gains, np.ascontiguousarray(axes))


def _network(model: nn.Module, stream: _Stream) -> tuple[nn.Module, dict[str, AnyArray]]:
    """The turned network, and its new values."""
    site, Q, network = stream.site, stream.axes, copy_of(model)
    state, values = network.state_dict(), dict[str, Tensor]()
    for name in site.writers:
        member, tensor = find_member(network, name), weight_name(network, name)
        W = values.get(tensor, state[tensor])
        dim = 1 if isinstance(member, nn.Embedding) or inputs_first(member) else 0  # type: ignore[arg-type]
        rows = site.rows_of(name, W.shape[dim])[:, 0]
        values[tensor] = _along(W, dim, rows, Q.T)
        bias = tensor_name(name, "bias")
        if bias in state:
            values[bias] = _along(state[bias], 0, rows, Q.T)
    for name in site.readers:
        tensor = weight_name(network, name)
        V = values.get(tensor, state[tensor])
        dim = 0 if inputs_first(find_member(network, name)) else 1  # type: ignore[arg-type]
        columns = site.columns_of(name, V.shape[dim])[:, 0]
        values[tensor] = _along(V, dim, columns, Q.T * stream.gains[name])
    for norm in site.norms:
        values[norm.weight] = torch.full_like(state[norm.weight], 1.0 - norm.offset)
    values = {name: value.to(state[name]) for name, value in values.items()}
    load(network, values)
    return network, {name: as_array(value) for name, value in values.items()}


def _along(values: Tensor, dim: int, places: Indices, matrix: Array) -> Tensor:
    """Values with some places along a dimension multiplied by a matrix."""
    index = torch.as_tensor(places, device=values.device)
    values = values.double()
    part = values.index_select(dim, index).movedim(dim, 0)
    new = torch.tensordot(torch.as_tensor(matrix, device=values.device), part, 1)
    return values.index_copy(dim, index, new.movedim(0, dim))


class _Turned(Mapping[str, Correlations]):
    """Correlations of a turned network's layers, made when they are asked for."""

    def __init__(
        self, known: Mapping[str, Correlations], stream: _Stream, layers: Mapping[str, Layer]
    ) -> None:
        self.known, self.stream, self.layers = known, stream, layers

    def __getitem__(self, name: str) -> Correlations:
        found, site = self.known[name], self.stream.site
        if name in site.readers:
            T = self.stream.read(name, len(found.xx))
            xx = T @ found.xx @ T.T
            found = replace(found, xx=(xx + xx.T) / 2, x_sum=T @ found.x_sum)
        concerned = name in site.readers or name in site.writers
        return own_outputs(found, self.layers[name].module) if concerned else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


def _gain(model: nn.Module, site: Site, norm: Norm) -> Array:
    """(channels,) gain of a norm, by the site's channels."""
    weight = as_array(model.state_dict()[norm.weight]).astype(np.float64) + norm.offset
    passed = next(name for name in (norm.weight, norm.weight.removesuffix(".weight")) if name in site.passed)
    return np.asarray(weight[site.rows_of(passed, len(weight))[:, 0]])


def _difference(original: nn.Module, other: nn.Module, batch: Batch) -> float:
    """‖difference‖ / ‖outputs‖ of two networks, the largest of all outputs."""
    with evaluating(original, other):
        pairs = zip(*(tensors_of(forward(one, batch)) for one in (original, other)), strict=True)
        return max(
            float((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30)) for a, b in pairs
        )
