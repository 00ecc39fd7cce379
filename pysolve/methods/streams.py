"""Streams in front of norms in their principal axes: channels that go are then directions of little variance.

The network is turned, not changed. With gains folded into the readers, x ↦ x / √(mean x² + ε) commutes with
any rotation Q of its channels: writers W become Qᵀ W and readers V become V diag(gain) Q. One Q serves the
whole stream, so that nothing is added, and the norms stay what they are. Layer norms take off the mean:
there Q keeps the vector of ones, and the k first axes, which have no mean, lie in the first k + 1 channels.

References
----------
S. Ashkboos et al., SliceGPT: Compress large language models by deleting rows and columns, 2024.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import AnyArray, Array, Indices
from pysolve.methods.heads import in_head_axes
from pysolve.methods.studied import widened
from pysolve.methods.study import Study, Turn
from pysolve.methods.turning import Turned, along, apart, put, study_of
from pysolve.methods.weights import weight_name
from pysolve.nn.cut.bare import Bare, find_member
from pysolve.nn.cut.values import load
from pysolve.nn.evaluate import parameters
from pysolve.nn.gathering.gather import gather_reached
from pysolve.nn.graph.branches import find_layers, read_by
from pysolve.nn.graph.export import trace_once
from pysolve.nn.graph.norms import norm_before
from pysolve.nn.graph.sizes import of_other_sizes
from pysolve.nn.layer_kinds import LINEAR, inputs_first, twins
from pysolve.nn.layer_matrix import LAYERS, channels
from pysolve.nn.layers.base import weight_of
from pysolve.nn.ranks import of_all_processes
from pysolve.nn.running import as_array, find_layer
from pysolve.nn.state import copy_of, untie
from pysolve.nn.threads import all_blas_threads
from pysolve.plan import Norm, Site, tensor_name
from pysolve.solve.lapack import eigh

# A gain below this share of the largest is none: nothing is read of that channel.
_SILENT = 1e-6
# A tied head is given a weight of its own where that adds less than this share of the parameters.
_UNTIED = 0.05
_MAKERS = (*LINEAR, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def in_principal_axes(study: Study) -> Study:
    """The study of an equal network whose streams have their principal axes for channels.

    Of every stream that norms alone read: with z = x / √(mean x² + ε), or without the mean, and readers V,
    gains included,

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


def as_needed(study: Study, keep: Mapping[Site, Indices]) -> Study:
    """The study without what was turned for nothing: streams and heads that lose no channels."""
    turn = study.turn
    if turn is None:
        return study
    heads = [site for site in turn.sites if site.attention]
    used, streams = [site for site in heads if site in keep], [one for one in turn.sites if one not in heads]
    if (not streams or any(site in keep for site in streams)) and len(used) == len(heads):
        return study
    before = replace(turn.before, sites=study.sites)
    if any(site in keep for site in streams):
        before = in_principal_axes(before)
    return in_head_axes(before, used) if used else before


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
        columns, T = self.site.columns_of(name, width)[:, 0], np.eye(width)
        T[np.ix_(columns, columns)] = self.axes.T * _inverse(self.gains[name])
        return T

    def write(self, name: str, width: int) -> Array:
        """(h, h) matrix that turns a writer's outputs."""
        rows = self.site.rows_of(name, width)[:, 0]
        if np.array_equal(rows, np.arange(width)):
            # One array for all of them.
            return self.axes.T
        T = np.eye(width)
        T[np.ix_(rows, rows)] = self.axes.T
        return T


def _turned(study: Study, site: Site) -> Study | str:
    """The study with one stream in its axes, or why that is not possible."""
    norms = {name for norm in site.norms for name in (norm.layer, norm.weight)}
    roles = ((site.readers, LINEAR), (site.writers, _MAKERS), (site.passed, Bare))
    strangers = [
        name
        for names, kinds in roles
        for name in names
        if name not in norms and not isinstance(find_member(study.model, name), kinds)
    ]
    # Buffers that no state dict holds take no values from a plan.
    held = study.model.state_dict()
    strangers += [n for n in site.passed if isinstance(find_member(study.model, n), Bare) and n not in held]
    if strangers:
        return f"{strangers[0]} cannot be turned"
    if len({norm.centred for norm in site.norms}) > 1:
        return "layer norms and root mean square norms read it"
    tied = [name for name in site.readers if find_member(study.model, name) in twins(study.model)]
    more = sum(weight_of(find_layer(study.model, name)).numel() for name in tied)
    if more > _UNTIED * parameters(study.model):
        return f"{tied[0]} would need a weight of its own"
    own = _untied(study, tied) if tied else study
    often = [name for name in site.readers if name not in own.layers or own.layers[name].calls != 1]
    if often:
        return f"{often[0]} does not run just once"
    with all_blas_threads(10.0 * site.channels**3):
        stream = _stream(own, site)
    network, values = _network(own.model, stream)
    difference = apart(study, network)
    if difference is not None:
        return f"turned, its outputs would differ by {difference:.1e}"
    assert own.graph is not None
    found = study_of(own, network, own.graph)
    turn = found.turn or Turn(study)
    outputs = dict(turn.outputs)
    for name in site.writers:
        member = find_member(own.model, name)
        if isinstance(member, (nn.Embedding, *LAYERS)):
            width = member.embedding_dim if isinstance(member, nn.Embedding) else channels(member)[1]
            T = stream.write(name, width)
            outputs[name] = T @ outputs[name] if name in outputs else T
    turn = replace(turn, values={**turn.values, **values}, sites=(*turn.sites, site), outputs=outputs)
    return replace(
        found,
        correlations=Turned(
            found.correlations,
            site.readers,
            stream.read,
            site.writers,
            found.layers,
            bound=own.options.memory,
        ),
        turn=turn,
    )


def _untied(study: Study, tied: Sequence[str]) -> Study:
    """The study of the network with weights of their own for layers that share them, and what these read."""
    assert study.calibration is not None
    names = tuple(weight_name(study.model, name) for name in tied)
    network, kept = untie(copy_of(study.model), names), study.calibration.kept
    graph, _ = trace_once(network, study.held[0])
    if any(study.options.ranks.counts(sum(of_other_sizes(graph, batch) for batch in kept))):
        graph, _ = widened(network, study.held[0], graph)
    seen = gather_reached(network, kept, tied, full=False, progress=study.options.progress)
    known = {name: one for name, one in seen.items() if one is not None}
    known = of_all_processes(known, study.options.ranks) if study.options.ranks.size > 1 else known
    before = study.turn or Turn(study)
    return replace(
        study_of(study, network, graph),
        correlations=ChainMap(known, study.correlations),  # type: ignore[arg-type]
        turn=replace(before, untied=(*before.untied, *names)),
    )


def _stream(study: Study, site: Site) -> _Stream:
    """A stream with its axes."""
    assert study.graph is not None
    nodes = {layer.name: node for node, layer in find_layers(study.graph, study.model).items()}
    gains, counted, D = dict[str, Array](), set[Norm | None](), site.channels
    moments, weights = np.zeros((2, D, D))
    for name in site.readers:
        norm = norm_before(study.graph, read_by(nodes[name]), site.norms)
        gain, shift = (np.ones(D), np.zeros(D)) if norm is None else _affine(study.model, site, norm)
        gains[name], known = gain, study.correlations.get(name)
        if known is None:
            continue
        columns = site.columns_of(name, len(known.xx))[:, 0]
        T = _Stream(site, gains, np.eye(D)).read(name, len(known.xx))
        xx, mean = (T @ known.xx @ T.T)[np.ix_(columns, columns)] / known.count, T @ known.x_sum / known.count
        crossed = np.outer(mean[columns] - shift / 2, shift)
        own = xx - crossed - crossed.T
        V = study.matrix(name)[:, columns] * gain
        squares = V.T @ V
        weights += squares / max(float(np.vdot(squares, own)), np.finfo(float).tiny)
        moments += 0 if norm in counted else own
        counted.add(norm)
    if not site.norms[0].centred:
        return _Stream(site, gains, _axes(moments, weights))
    H = _without_mean(D)
    axes = H @ _axes(H.T @ moments @ H, H.T @ weights @ H) @ H.T + 1 / D
    return _Stream(site, gains, np.ascontiguousarray(axes))


def _axes(moments: Array, weights: Array) -> Array:
    """Eigenvectors of S^½ A S^½, those of the largest values first."""
    values, vectors = eigh(moments)
    root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    return np.ascontiguousarray(eigh(root @ weights @ root)[1][:, ::-1])


def _without_mean(n: int) -> Array:
    """(n, n − 1) orthonormal columns without a mean; of the first k + 1 rows, the first k span what has none.

    The later columns are constant there, which the norm over these rows takes off.
    """
    j = np.arange(1.0, n)
    upper = np.triu(np.ones((n, n - 1)))
    upper[np.arange(1, n), np.arange(n - 1)] = -j
    return np.asarray(upper / np.sqrt(j * (j + 1)))


def _network(model: nn.Module, stream: _Stream) -> tuple[nn.Module, dict[str, AnyArray]]:
    """The turned network, and its new values."""
    site, Q, network = stream.site, stream.axes, copy_of(model)
    state, values = network.state_dict(), dict[str, Tensor]()
    for name in (*site.writers, *site.passed):
        member = find_member(network, name)
        if isinstance(member, Bare):
            table, old = site.rows_of(name, member.values.numel()), as_array(state[name].double().flatten())
            values[name] = put(state[name], table, Q.T @ old[table])
        elif isinstance(member, nn.Module) and name in site.writers:
            tensor, bias = weight_name(network, name), tensor_name(name, "bias")
            dim = 1 if isinstance(member, nn.Embedding) or inputs_first(member) else 0
            rows = site.rows_of(name, state[tensor].shape[dim])[:, 0]
            values[tensor] = along(state[tensor], dim, rows, Q.T)
            if bias in state:
                values[bias] = along(state[bias], 0, rows, Q.T)
    for name in site.readers:
        tensor = weight_name(network, name)
        V = values.get(tensor, state[tensor])
        dim = 0 if inputs_first(find_layer(network, name)) else 1
        columns = site.columns_of(name, V.shape[dim])[:, 0]
        values[tensor] = along(V, dim, columns, Q.T * stream.gains[name])
    for norm in site.norms:
        values[norm.weight] = torch.full_like(state[norm.weight], 1.0 - norm.offset)
        bias = norm.weight.removesuffix("weight") + "bias"
        if norm.centred and bias in state:
            rows = site.rows_of(norm.layer, site.channels)[:, 0]
            values[bias] = put(state[bias], rows, Q.T @ _affine(model, site, norm)[1])
    values = {name: value.to(state[name]) for name, value in values.items()}
    load(network, values)
    return network, {name: as_array(value) for name, value in values.items()}


def _affine(model: nn.Module, site: Site, norm: Norm) -> tuple[Array, Array]:
    """(channels,) gain of a norm, and its bias as a multiple of the gain, by the site's channels."""
    state, layer = model.state_dict(), norm.layer
    gain = as_array(state[norm.weight]).astype(np.float64) + norm.offset
    passed = next(name for name in (norm.weight, layer) if name in site.passed)
    rows = site.rows_of(passed, len(gain))[:, 0]
    bias = state.get(tensor_name(layer, "bias")) if norm.centred else None
    shift = np.zeros(len(gain)) if bias is None else as_array(bias).astype(np.float64)
    return gain[rows], _inverse(gain)[rows] * shift[rows]


def _inverse(gain: Array) -> Array:
    """1 / gain, and zero where nothing is heard."""
    heard = np.abs(gain) > _SILENT * np.abs(gain).max()
    return np.divide(1.0, gain, out=np.zeros_like(gain), where=heard)
