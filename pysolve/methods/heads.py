"""Heads of attention in their principal axes: dimensions that go are then those that carry least.

The network is turned, not changed. A head adds  W_o W_v x  weighted by softmax(s · qᵀ k): W_v → M W_v with
W_o → W_o M⁻¹, and W_q → N⁻ᵀ W_q with W_k → N W_k, biases included, leave it what it is. Heads that share keys
and values share M and N. Where the code turns queries and keys by position, only whole frequencies can go,
the same in all heads: N is the identity there.

References
----------
C.-H. Lin et al., MoDeGPT: Modular decomposition for large language model compression, 2024.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from pysolve.correlations import AnyArray, Array, Indices, without_sums
from pysolve.methods.study import Study, Turn
from pysolve.methods.turning import Turned, along, apart, study_of
from pysolve.methods.weights import weight_name
from pysolve.nn.cut.values import load
from pysolve.nn.layer_kinds import LINEAR, inputs_first
from pysolve.nn.running import as_array, find_layer
from pysolve.nn.state import copy_of
from pysolve.plan import Attention, Site, tensor_name
from pysolve.solve.lapack import eigh

# Share of their mean variance that directions of keys and of heads' results have at least: others would be
# stretched without bound.
_DAMPING = 1e-4
_TINY = float(np.finfo(float).tiny)


def in_head_axes(study: Study, sites: Iterable[Site]) -> Study:
    """The study of an equal network whose heads have their principal axes for dimensions.

    For the heads of each pair of keys and values, with z their results and A = Σ W_oᵀ W_o, Z = Σ cov(z) over
    these heads, the first axes of values span those of  Z^½ A Z^½ , largest first: what the output layer,
    refitted, loses least with. Of queries and keys, with Q = Σ E[q qᵀ] and K = cov(k), they are those of the
    singular values of  Q^½ K^½ : means of keys change no softmax.

    Parameters
    ----------
    study : Study
    sites : iterable of Site
        Dimensions of heads. One whose turned network does not equal the original is pinned, and says why.

    Returns
    -------
    Study
        Of the turned network, with correlations in its axes; ``turn`` holds the way to it.
    """
    sites = [*sites]
    found = _turned(study, sites)
    if not isinstance(found, str):
        return found
    for site in sites:
        one = _turned(study, [site])
        study = _pinned(study, site, one) if isinstance(one, str) else one
    return study


def order_of(study: Study, site: Site) -> Indices:
    """Channels of a site of dimensions of heads, those that carry most first."""
    if not _by_position(site):
        return np.arange(site.channels)
    powers = (np.diag(_energies(study, site, one)) for one in site.attention)
    return np.argsort(-sum(one / max(one.sum(), _TINY) for one in powers), kind="stable")


def scores_lost(study: Study, site: Site, order: Indices) -> Array:
    """(channels + 1,) share of the scores' energy that is lost with the first 0 … channels."""
    energies = [_energies(study, site, one)[np.ix_(order, order)] for one in site.attention]
    tails = [np.array([one[k:, k:].sum() for k in range(len(one) + 1)]) for one in energies]
    return np.asarray(np.mean([np.maximum(one, 0.0) / max(one[0], _TINY) for one in tails], axis=0))


@dataclass(frozen=True, eq=False)
class _Axes:
    """What turns some heads: N of each group of keys, M of each group of values, one axis a row."""

    one: Attention
    keys: Sequence[Array]
    values: Sequence[Array]

    def read(self, width: int) -> Array:
        """(d, d) matrix that turns the inputs of the output layer."""
        T, each = np.eye(width), len(self.one.queries) // len(self.one.values)
        for h, columns in enumerate(self.one.outputs):
            T[np.ix_(columns, columns)] = self.values[h // each]
        return T


def _turned(study: Study, sites: Sequence[Site]) -> Study | str:
    """The study with heads in their axes, or why that is not possible."""
    assert study.graph is not None
    heads = [one for site in sites for one in site.attention]
    for one in heads:
        for name in (one.query, one.key, one.value, one.output):
            if name not in study.correlations:
                return f"nothing is known of what {name} reads"
            if study.layers[name].calls != 1:
                return f"{name} does not run just once"
            if not isinstance(find_layer(study.model, name), LINEAR):
                return f"{name} cannot be turned"
    axes = [_axes(study, site, one) for site in sites for one in site.attention]
    network, values = _network(study.model, axes)
    difference = apart(study, network)
    if difference is not None:
        return f"turned, its outputs would differ by {difference:.1e}"
    read = {one.one.output: one for one in axes}
    writers = {name for one in heads for name in (one.query, one.key, one.value)}
    found = study_of(study, network, study.graph)
    known = Turned(
        study.correlations,
        read,
        lambda name, width: read[name].read(width),
        writers,
        found.layers,
        bound=study.options.memory,
    )
    turn = study.turn or Turn(study)
    turn = replace(turn, values={**turn.values, **values}, sites=(*turn.sites, *sites))
    return replace(found, correlations=known, turn=turn)


def _pinned(study: Study, site: Site, why: str) -> Study:
    sites = [replace(one, pinned=why) if one == site else one for one in study.sites]
    return replace(study, sites=sites)


def _axes(study: Study, site: Site, one: Attention) -> _Axes:
    """The axes of one attention."""
    d = one.queries.shape[1]
    keys = [np.eye(d)] * len(one.keys)
    if not _by_position(site):
        Q, K = _moments(study, one.query, one.queries), _moments(study, one.key, one.keys)
        sums = [np.sum([Q[h][0] for h in own], axis=0) for own in _groups(one)]
        keys = [_of_scores(total, centred) for total, (_, centred) in zip(sums, K, strict=True)]
    places = np.concatenate([_dims(site, one, channel) for channel in order_of(study, site)])
    values = []
    for Z, A in _results(study, one):
        M = np.empty((d, d))
        M[places] = _of_results(Z, A)
        values.append(M)
    return _Axes(one, keys, values)


def _groups(one: Attention) -> list[range]:
    """Heads that share keys and values."""
    each = len(one.queries) // len(one.keys)
    return [range(g * each, (g + 1) * each) for g in range(len(one.keys))]


def _of_scores(Q: Array, K: Array) -> Array:
    """N: the rows of  Vᵀ K^-½ , V from  Q^½ K^½ = U S Vᵀ , each of unit length."""
    root, inverse = _roots(K)
    N = eigh(root @ Q @ root)[1][:, ::-1].T @ inverse
    return np.asarray(N / np.linalg.norm(N, axis=1, keepdims=True))


def _of_results(Z: Array, A: Array) -> Array:
    """M: orthonormal rows, the first k of which span the k first axes of results Z that A weighs."""
    root, inverse = _roots(Z)
    functionals = inverse @ eigh(root @ A @ root)[1][:, ::-1]
    return np.ascontiguousarray(np.linalg.qr(functionals)[0].T)


def _roots(moments: Array) -> tuple[Array, Array]:
    """(n, n) square root of a matrix, damped, and its inverse."""
    values, vectors = eigh(moments)
    mean = float(np.mean(values))
    # Of what never varies any axes will do.
    damping = _DAMPING * mean if mean > _TINY else 1.0
    roots = np.sqrt(np.maximum(values, 0.0) + damping)
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _moments(study: Study, name: str, heads: Iterable[Indices]) -> list[tuple[Array, Array]]:
    """E[y yᵀ] and cov(y) of some outputs of a layer, head by head."""
    known, weight = study.correlations[name], study.matrix(name)
    bias = study.layers[name].module.bias
    shift = np.zeros(len(weight)) if bias is None else as_array(bias.detach()).astype(np.float64)
    found, x = [], known.x_sum / known.count
    for rows in heads:
        W = weight[rows]
        covariance = W @ known.xx @ W.T / known.count - np.outer(W @ x, W @ x)
        mean = W @ x + shift[rows]
        found.append((covariance + np.outer(mean, mean), covariance))
    return found


def _results(study: Study, one: Attention) -> Iterator[tuple[Array, Array]]:
    """Sums over heads of their results' covariances and of the output layer's squares, by group of values."""
    known, W = study.correlations[one.output], study.matrix(one.output)
    able = study.options.new_biases or study.layers[one.output].takes_bias
    R, _ = (known if able else without_sums(known)).covariance()
    for own in _groups(one):
        heads = [one.outputs[h] for h in own]
        Z = np.sum([R[np.ix_(columns, columns)] for columns in heads], axis=0)
        yield Z, np.sum([W[:, columns].T @ W[:, columns] for columns in heads], axis=0)


def _energies(study: Study, site: Site, one: Attention) -> Array:
    """(channels, channels) matrix whose blocks' sums are the energy of what their channels add to scores.

    Where positions turn them, of all angles: different frequencies then have nothing in common.
    """
    found, dims = np.zeros((site.channels,) * 2), [_dims(site, one, c) for c in range(site.channels)]
    queries, keys = _moments(study, one.query, one.queries), _moments(study, one.key, one.keys)
    for (K, centred), own in zip(keys, _groups(one), strict=True):
        Q = np.sum([queries[h][0] for h in own], axis=0)
        if _by_position(site):
            powers = [np.trace(Q[np.ix_(pair, pair)]) * np.trace(K[np.ix_(pair, pair)]) for pair in dims]
            found += np.diag(powers) / 2
        else:
            found += Q * centred
    return found


def _dims(site: Site, one: Attention, channel: int) -> Indices:
    """Dimensions of a head that are one channel of the site."""
    return np.flatnonzero(np.isin(one.queries[0], site.rows[one.query][channel]))


def _by_position(site: Site) -> bool:
    """Whether several dimensions of a head go together: those that are turned by one frequency."""
    return any(one.queries.shape[1] > site.channels for one in site.attention)


def _network(model: nn.Module, axes: Sequence[_Axes]) -> tuple[nn.Module, dict[str, AnyArray]]:
    """The turned network, and its new values."""
    network = copy_of(model)
    state = network.state_dict()
    values = dict[str, Tensor]()
    new: ChainMap[str, Tensor] = ChainMap(values, state)
    for name, rows, matrix in (turn for one in axes for turn in _turns(one)):
        tensor, bias = weight_name(network, name), tensor_name(name, "bias")
        first = inputs_first(find_layer(network, name))
        new[tensor] = along(new[tensor], 1 if first else 0, rows, matrix)
        if bias in state:
            new[bias] = along(new[bias], 0, rows, matrix)
    for one in axes:
        tensor = weight_name(network, one.one.output)
        dim = 0 if inputs_first(find_layer(network, one.one.output)) else 1
        each = len(one.one.queries) // len(one.one.values)
        for h, columns in enumerate(one.one.outputs):
            new[tensor] = along(new[tensor], dim, columns, one.values[h // each])
    values = {name: value.to(state[name]) for name, value in values.items()}
    load(network, values)
    return network, {name: as_array(value) for name, value in values.items()}


def _turns(axes: _Axes) -> Iterator[tuple[str, Indices, Array]]:
    """Layers, rows, and what these are multiplied by."""
    one, each = axes.one, len(axes.one.queries) // len(axes.one.keys)
    for h, rows in enumerate(one.queries):
        yield one.query, rows, np.asarray(np.linalg.inv(axes.keys[h // each]).T)
    for rows, N in zip(one.keys, axes.keys, strict=True):
        yield one.key, rows, N
    for rows, M in zip(one.values, axes.values, strict=True):
        yield one.value, rows, M
