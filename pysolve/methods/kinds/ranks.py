"""Layers that are factored: the menu of ranks of a layer, and its factors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pysolve.correlations import Array, Correlations
from pysolve.layer.layer_fit import LayerFit
from pysolve.layer.reduced_rank import Decomposed, decompose
from pysolve.methods.kinds.embeddings import Table, linear_heads, tables_of, untrue
from pysolve.methods.kinds.sensed import metrics_of, sensed
from pysolve.methods.menu import FLOOR, Chosen, Menu, Task
from pysolve.methods.study import Study
from pysolve.methods.weights import weight_name
from pysolve.nn.batches.samples import take
from pysolve.nn.cost.counting import layer_macs, macs
from pysolve.nn.cost.per_sample import sample_macs, workload
from pysolve.nn.cost.profile import layer_inputs
from pysolve.nn.graph.branches import Layer as Seen
from pysolve.nn.layer_kinds import LINEAR, is_extended, plain
from pysolve.nn.layers.base import Dense
from pysolve.nn.layers.factored import CONVOLUTIONS, Factored, empty, empty_matrix, factors
from pysolve.nn.layers.factored_recurrent import runs_as_two
from pysolve.nn.running import find_layer

STRUCTURES = ("auto", "channel", "spatial")
# Samples that layers run on to be counted and timed; directions for each batch of sensitivities.
TIMED, _DIRECTIONS = 64, 2

Costs = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class RankMenu(Menu):
    """Every rank at which a layer's factors are smaller than the layer; the last size is the layer as it is.

    Parameters
    ----------
    lost : (most + 1,) array
        The error at rank 0 … most, where zero may be zero.
    spatial : bool
        Whether the factors lie along height and width.
    inner, outer, dense : {"params", "macs", "bytes": number}
        What one rank costs in each factor, and what the layer's weight costs now.
    table : Table, optional
        Of an embedding; its rows are the inner factor's.
    gates : bool
        Whether it is a weight of a recurrent layer.
    """

    lost: Array = field(default_factory=lambda: np.zeros(0))
    spatial: bool = False
    inner: Costs = field(default_factory=dict)
    outer: Costs = field(default_factory=dict)
    dense: Costs = field(default_factory=dict)
    table: Table | None = None
    gates: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that are factored together, as costs name them."""
        own = f"{self.unit}:oi" if self.gates else str(self.unit)
        return (own, *(() if self.table is None else self.table.heads))

    @property
    def most(self) -> int:
        """The largest rank that pays."""
        return self.whole - 1

    @property
    def saved(self) -> dict[str, float]:
        """What all ranks together may cost."""
        if self.table is None:
            return {**self.dense}
        return {m: self.dense[m] - self.table.fixed[m] - self.table.once[m] for m in self.dense}

    @property
    def each(self) -> dict[str, float]:
        """What one rank costs."""
        return {measure: self.inner[measure] + self.outer[measure] for measure in self.dense}


@dataclass(frozen=True, eq=False)
class Ranks:
    """Layers as two smaller ones.

    Parameters
    ----------
    structure : "auto", "channel" or "spatial"
    plain : bool
        Whether the nearest weights are sought instead of the nearest outputs.
    metrics : {layer: (h, h) array}
        What errors at a layer's outputs mean to the network's.
    inputs : {layer: tensor}
        What each layer reads for some samples.
    counts : {layer: float}
        MACs of each layer for one sample.
    tables : {embedding: Table}
    gates : collection of str
        Weights of recurrent layers.
    """

    structure: str = "auto"
    plain: bool = False
    metrics: Mapping[str, Array] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    gates: Collection[str] = ()

    def menus(self, study: Study, name: str) -> list[RankMenu]:
        """A layer in both structures, the better one at half the cost first; none where no rank pays."""
        if name in self.tables:
            return [self._menu_of_table(study, name)] if self.tables[name].most else []
        if name in self.gates:
            return [menu] if (menu := self._menu_of_gates(study, name)).most else []
        kernel = tuple(study.weights[name].shape[2:])
        flat = len(kernel) != 2 or min(kernel) == 1 or is_extended(find_layer(study.model, name))
        ways = {"channel": [False], "spatial": [True], "auto": [False, True]}[self.structure]
        found = [self.menu(study, name, spatial) for spatial in ([False] if flat else ways)]
        paying = [one for one in found if one.most]
        return sorted(paying, key=lambda one: float(one.error[(one.most + 1) // 2]))

    def menu(self, study: Study, name: str, spatial: bool = False) -> RankMenu:
        """What a layer loses at every rank, from one decomposition, and what it costs."""
        layer = find_layer(study.model, name)
        costs = _costs(layer, spatial, self.counts.get(name, 0.0), self.inputs.get(name))
        return self._menu(study, name, costs, spatial)

    def unturned(self, outputs: Mapping[str, Array]) -> Ranks:
        """The kind of a network whose outputs are y where those of this one are T y, with orthogonal T.

        An error T e means  eᵀ (Tᵀ S T) e.
        """
        metrics = {
            name: outputs[name].T @ S @ outputs[name] if name in outputs else S
            for name, S in self.metrics.items()
        }
        tables = {
            name: replace(one, uses=one.uses.turned(outputs[name])) if name in outputs else one
            for name, one in self.tables.items()
        }
        return replace(self, metrics=metrics, tables=tables)

    def again(self, study: Study, menu: RankMenu) -> RankMenu:
        """A menu of the same layer in the same structure, in another study."""
        name = str(menu.unit)
        if menu.table is not None:
            return self._menu_of_table(study, name)
        return self._menu_of_gates(study, name) if menu.gates else self.menu(study, name, menu.spatial)

    def _menu_of_gates(self, study: Study, name: str) -> RankMenu:
        """What a weight of a recurrent layer loses at every rank, and what it costs."""
        owner, _, leaf = name.rpartition(".")
        costs = _costs_of_gates(find_layer(study.model, owner), leaf, self.counts.get(owner, 0.0))
        return replace(self._menu(study, name, costs), gates=True)

    def _menu(
        self, study: Study, name: str, costs: tuple[Costs, Costs, Costs], spatial: bool = False
    ) -> RankMenu:
        (inner, outer, dense), kernel = costs, tuple(study.weights[name].shape[2:])
        most = most_useful(inner, outer, dense)
        known, metric = self._correlations(study, name), self.metrics.get(name)
        whole = decompose(study.matrix(name), known, kernel=kernel, spatial=spatial, metric=metric)
        lost = whole.lost(most)
        error = np.minimum.accumulate(np.append(np.maximum(lost, FLOOR), FLOOR))
        fit = partial(self.fit, kernel=kernel, spatial=spatial, made=[whole])

        def at(rank: int) -> Chosen:
            return Chosen(fits={name: partial(fit, rank=rank)})

        return RankMenu(name, error, at, lost=lost, spatial=spatial, inner=inner, outer=outer, dense=dense)

    def _menu_of_table(self, study: Study, name: str) -> RankMenu:
        """What an embedding loses at every rank, and what it costs."""
        table, weight = self.tables[name], study.matrix(name)
        whole = table.decomposed(weight)
        lost = whole.tails[: table.most + 1]
        error = np.minimum.accumulate(np.append(np.maximum(lost, FLOOR), FLOOR))

        def fit(task: Task, rank: int) -> LayerFit:
            uncut = task.weight.shape == weight.shape
            columns = None if uncut or task.places is None else task.places[0]
            made = whole if uncut else table.decomposed(task.weight, columns)
            return table.fit(task, made, rank)

        def at(rank: int) -> Chosen:
            return Chosen(fits={name: partial(fit, rank=rank)})

        inner, outer, dense = table.inner, table.outer, table.dense
        return RankMenu(name, error, at, lost=lost, inner=inner, outer=outer, dense=dense, table=table)

    def fit(
        self,
        task: Task,
        *,
        rank: int,
        kernel: tuple[int, ...] = (),
        spatial: bool = False,
        made: list[Decomposed] | None = None,
    ) -> LayerFit:
        """The best layer of a rank, or as it is where that would be no smaller than the layer became.

        ``made``: decompositions of the whole layer on the original's inputs, for all ranks; grows.
        """
        metric, known = self.metrics.get(task.name), None if self.plain else task.correlations
        if metric is not None:
            metric = metric[np.ix_(task.outputs, task.outputs)]
        kept = [] if made is None else made
        found = next((one for one in kept if _is_of(one, task.weight, known)), None)
        if found is None:
            # Of what was cut or moved, which is fitted once, only as many directions as this rank needs.
            whole = bool(kept) and _reads_the_same(kept[0].correlations, known)
            most = None if whole else rank
            found = decompose(task.weight, known, most, kernel=kernel, spatial=spatial, metric=metric)
            kept += [found] if whole else []
        return found.layer(rank)

    def _correlations(self, study: Study, name: str) -> Correlations | None:
        return None if self.plain else study.correlations.get(name)


def ranks_of(study: Study, structure: str, svd: bool, unseen: str = "exact") -> tuple[Ranks, dict[str, str]]:
    """The kind for a studied network, and why some of its layers cannot be factored."""
    gates = [name for name in study.weights if weight_name(study.model, name) == name]
    layers = {name: find_layer(study.model, name) for name in study.weights if name not in gates}
    against = {
        name: why for name, layer in layers.items() if (why := _reason_against(name, layer, study.layers))
    }
    if study.calibration is not None:
        against |= _untrue(study, {name: layer for name, layer in layers.items() if name not in against})
        against |= untrue(study, {name: empty_matrix(study.weights[name], 1) for name in gates})
    embeddings = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, nn.Embedding) and name not in against
    }
    sensing = ([], 0) if study.calibration is None or svd else (sensed(study), _DIRECTIONS)
    tables, more = tables_of(study, embeddings, unseen, svd, sensing)
    against |= more
    layers = {name: layer for name, layer in layers.items() if not isinstance(layer, nn.Embedding)}
    kind = Ranks(structure, svd, tables=tables, gates=gates)
    if study.calibration is None:
        return kind, against
    if not svd:
        against |= dict.fromkeys(
            {*layers, *gates} - study.correlations.keys() - against.keys(), "what it reads is not seen"
        )
        able = {name: study.layers[name].module for name in layers.keys() - against.keys()}
        own = {name: study.weights[name] for name in gates if name not in against}
        metrics = metrics_of(study, able, alike=1.0, directions=_DIRECTIONS, gates=own)
        kind = replace(kind, metrics=metrics)
    counts, batch = sample_macs(study.model, workload(study.held)), take(study.held[0], 0, TIMED)
    # An embedding, which multiplies nothing, takes longer as two in any case: the time is that of its head.
    heads = {head: name for name, table in tables.items() for head in linear_heads(study, table.heads)[:1]}
    timed = {**layers, **{head: find_layer(study.model, head) for head in heads}}
    read = layer_inputs(study.model, timed, batch)
    inputs = {heads.get(name, name): x for name, x in read.items()}
    return replace(kind, inputs=inputs, counts=counts), against


def _is_of(made: Decomposed, W: Array, known: Correlations | None) -> bool:
    """Whether a decomposition is that of these weights on these inputs."""
    own = made.correlations
    if own is None or known is None:
        return own is known and np.array_equal(made.W, W)
    sums = np.array_equal(own.x_sum, known.x_sum) and np.array_equal(own.y_sum, known.y_sum)
    return _reads_the_same(own, known) and sums and np.array_equal(made.W, W)


def _reads_the_same(one: Correlations | None, other: Correlations | None) -> bool:
    """Whether products are the same arrays; without a bias, a layer is fitted without the sums."""
    if one is None or other is None:
        return one is other
    return one.xx is other.xx and one.yx is other.yx


def _untrue(study: Study, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers that the network's code does not run as two."""
    forms = {
        name: empty(layer, 1) for name, layer in layers.items() if isinstance(layer, Dense | nn.Embedding)
    }
    # Embeddings by themselves: behind one of rank one, whose rows are all alike to a norm, random layers
    # make rounding large.
    tables = {name: form for name, form in forms.items() if isinstance(layers[name], nn.Embedding)}
    return untrue(study, tables) | untrue(study, {n: form for n, form in forms.items() if n not in tables})


def most_useful(inner: Costs, outer: Costs, dense: Costs) -> int:
    """The largest rank that costs less than the layer does, wherever that costs anything."""
    return min(int(np.ceil(cost / (inner[what] + outer[what]))) - 1 for what, cost in dense.items() if cost)


def _reason_against(name: str, layer: nn.Module, seen: Mapping[str, Seen]) -> str | None:
    """Why a layer cannot be factored, if it cannot."""
    if not name:
        return "it is the whole network: put it into an nn.Sequential"
    if type(layer) is NonDynamicallyQuantizableLinear:
        return "attention calls its function, not the layer"
    if isinstance(layer, nn.Embedding):
        return None if layer.max_norm is None else f"it rescales its rows to max_norm={layer.max_norm}"
    if plain(layer) not in (*LINEAR, *CONVOLUTIONS):
        return f"a {type(layer).__name__} cannot be factored"
    if getattr(layer, "groups", 1) > 1:
        return "it has groups"
    if is_extended(layer) and (name not in seen or seen[name].besides is None):
        return f"what the code of a {type(layer).__name__} does is not seen"
    return f"its own code {seen[name].besides}" if name in seen and seen[name].besides else None


def _costs_of_gates(
    layer: nn.Module, leaf: str, count: float
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Costs of one rank in the inner and the outer factor, and of the weight now; ``count``: all MACs.

    Of a weight that is multiplied out, steps multiply with all of it whatever its rank, and it is made once.
    """
    assert isinstance(layer, nn.RNNBase)
    weight: Tensor = getattr(layer, leaf)
    (h, d), two = weight.shape, runs_as_two(layer, leaf)
    steps = count / sum(one.numel() for one in layer.parameters() if one.ndim == 2)
    macs = (steps * d, steps * h, steps * h * d) if two else (0.0, float(h * d), 0.0)
    inner, outer, dense = (
        {"params": float(n), "macs": each, "bytes": float(n * weight.itemsize)}
        for n, each in zip((d, h, h * d), macs, strict=True)
    )
    return inner, outer, dense


def _costs(
    layer: nn.Module, spatial: bool, count: float, x: Tensor | None
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Costs of one rank in the inner and the outer layer, and of the weight now; ``count``: its MACs."""
    assert isinstance(layer, Dense)
    form, weight = empty(layer, 1, spatial=spatial), layer.weight
    sizes = [*(part.size for part in factors(layer, form)), weight.numel()]
    # Without data nothing is known of positions: MACs count one.
    calls = [float(size) for size in sizes]
    if x is not None and count:
        two = layer_macs(Factored.from_form(layer, form), x)
        calls = [count * n / macs(layer, x) for n in (two["inner"], two["outer"], macs(layer, x))]
    inner, outer, dense = (
        {"params": float(n), "macs": calls[i], "bytes": float(n * weight.itemsize)}
        for i, n in enumerate(sizes)
    )
    return inner, outer, dense
