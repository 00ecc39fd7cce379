"""Embeddings that are factored: how they are used, their menus of ranks, and their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from pysolve.correlations import Array, Indices, all_but
from pysolve.forms import Form, LowRank
from pysolve.layer.embedding_rank import DecomposedTable, Uses, decompose_table, table_loss
from pysolve.layer.layer_fit import LayerFit
from pysolve.methods.menu import Task
from pysolve.methods.study import Study
from pysolve.methods.weights import weight_name
from pysolve.nn.batches.samples import take
from pysolve.nn.cost.per_sample import sample_macs, workload
from pysolve.nn.cut.apply import apply, untrue_forms
from pysolve.nn.gathering.gather import gather_reached
from pysolve.nn.gathering.lookups import lookup_counts, lookup_sensitivities
from pysolve.nn.layer_kinds import is_extended, tied_tables
from pysolve.nn.layers.factored import empty
from pysolve.nn.ranks import of_all_processes
from pysolve.nn.running import Batch, find_layer
from pysolve.plan import Plan

# Why a layer stays as it is whose code, or the code around it, does not run with another in its place.
ASKS = "the network's code asks for more than another layer in its place has"
# What rows that never occur in the batches become.
UNSEEN = ("exact", "approximate")

Costs = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Table:
    """An embedding that may be factored.

    Parameters
    ----------
    uses : Uses
        Of all rows.
    rows : (n,) int array
        Rows that stay as they are.
    heads : tuple of str
        Layers that share the weight.
    inner, outer, fixed, once, dense : {"params", "macs", "bytes": number}
        What one rank costs in the rows and in the columns; what the rows that stay cost and, whatever its
        width, the rest; and what the weight costs now.
    """

    uses: Uses
    rows: Indices
    heads: tuple[str, ...] = ()
    inner: Costs = field(default_factory=dict)
    outer: Costs = field(default_factory=dict)
    fixed: Costs = field(default_factory=dict)
    once: Costs = field(default_factory=dict)
    dense: Costs = field(default_factory=dict)

    @property
    def others(self) -> Indices:
        """Rows that are approximated."""
        return all_but(len(self.uses.counts), self.rows)

    @property
    def most(self) -> int:
        """The largest rank that costs less than the embedding does, wherever that costs anything."""
        rests = {
            what: (self.dense[what] - self.fixed[what] - self.once[what])
            / (self.inner[what] + self.outer[what])
            for what in self.dense
            if self.dense[what]
        }
        return max(0, int(np.ceil(min(rests.values()))) - 1)

    def decomposed(self, weight: Array, columns: Indices | None = None) -> DecomposedTable:
        """The rows that are approximated, decomposed; ``columns`` are those that ``weight`` has left."""
        every = np.arange(len(self.uses.metric)) if columns is None else columns
        return decompose_table(weight[self.others], self.uses.of(self.others, every))

    def fit(self, task: Task, made: DecomposedTable, rank: int) -> LayerFit:
        """The best embedding of a rank."""
        A, B = made.factors(rank)
        form = LowRank(A, B, self.rows, task.weight[self.rows]) if len(self.rows) else LowRank(A, B)
        whole = table_loss(made.table, np.zeros_like(made.table), made.uses) or 1.0
        return LayerFit(form.dense(), None, table_loss(made.table, A @ B, made.uses) / whole, form)

    def why_not(self) -> str:
        """Why no rank of it pays."""
        n, V = len(self.rows), len(self.uses.counts)
        if not n:
            return "too small for any rank to pay"
        return (
            f"{n:,} of its {V:,} rows never occur in the batches and stay exact: give more of them, or "
            'unseen="approximate"'
        )


def tables_of(
    study: Study, names: Mapping[str, nn.Embedding], unseen: str, svd: bool, sensed: tuple[list[Batch], int]
) -> tuple[dict[str, Table], dict[str, str]]:
    """How some embeddings are used, and why others of them cannot be factored.

    ``sensed``: samples to take sensitivities on, and directions for each batch of them.
    """
    shared, against = _heads(study), dict[str, str]()
    untied = study.turn.untied if study.turn is not None else ()
    shared_before = _heads(study, original=True) if untied else shared
    for name in names:
        if shared_before.get(name, ()) != shared.get(name, ()):
            against[name] = f"{untied[0]} was given values of its own"
    weights = {name: study.weights[name] for name in names if name not in against}
    if svd or study.calibration is None:
        uses = {name: Uses(np.ones(len(w)), np.eye(w.shape[1])) for name, w in weights.items()}
        apart = dict.fromkeys(uses, np.zeros(0, np.intp))
    else:
        uses = _uses(study, {name: shared.get(name, ()) for name in weights}, sensed)
        apart = {name: np.flatnonzero(one.counts == 0) for name, one in uses.items()}
        for name, one in [*uses.items()]:
            if not one.counts.any():
                against[name] = "no batch reached it"
                del uses[name]
            elif unseen == "approximate":
                uses[name] = replace(one, counts=np.maximum(one.counts, 1.0))
                apart[name] = np.zeros(0, np.intp)
    # Code that does more than to look up may count on whole tables.
    forms = {
        name: empty(layer, 1, rows=apart[name])
        for name, layer in names.items()
        if name in uses and is_extended(layer) and 0 < len(apart[name]) < len(layer.weight)
    }
    against |= untrue(study, forms)
    found = {
        name: Table(one, apart[name], shared.get(name, ()))
        for name, one in uses.items()
        if name not in against
    }
    return _with_costs(study, found), against


def untrue(study: Study, forms: Mapping[str, LowRank]) -> dict[str, str]:
    """Layers that the network's code does not run in forms of these shapes, tried out with random factors."""
    random, tried = np.random.default_rng(0), dict[str, Form]()
    for name, one in forms.items():
        outer, inner = (
            random.standard_normal(part.shape) / part[0].size ** 0.5 for part in (one.outer, one.inner)
        )
        exact = None if one.exact is None else random.standard_normal(one.exact.shape)
        tried[weight_name(study.model, name)] = LowRank(outer, inner, one.rows, exact)
    unable = untrue_forms(study.model, Plan(forms=tried), take(study.held[0], 0, 2)) if forms else []
    return {name: ASKS for name in forms if weight_name(study.model, name) in unable}


def _heads(study: Study, *, original: bool = False) -> dict[str, tuple[str, ...]]:
    """Names of the layers that share an embedding's weight, by its own."""
    model = study.original if original else study.model
    names = {module: name for name, module in model.named_modules()}
    return {names[one]: tuple(names[other] for other in more) for one, more in tied_tables(model).items()}


def _uses(
    study: Study, shared: Mapping[str, tuple[str, ...]], sensed: tuple[list[Batch], int]
) -> dict[str, Uses]:
    """What the batches look up, and what errors of it mean."""
    assert study.calibration is not None
    ranks, kept, weights = study.options.ranks, study.calibration.kept, study.weights
    tables = {name: weights[name] for name in shared}
    counts = lookup_counts(study.model, study.graph, tables, kept)
    ranks.add_up(*counts.values())
    samples, directions = sensed
    metrics = ranks.first(lookup_sensitivities(study.model, tables, samples, probes=directions))
    heads = [head for others in shared.values() for head in linear_heads(study, others)]
    moments = gather_reached(study.model, kept, heads, full=False, progress=False) if heads else {}
    known = {name: one for name, one in moments.items() if one is not None}
    known = of_all_processes(known, ranks) if ranks.size > 1 else known
    found = {}
    for name, others in shared.items():
        read = [known[head].xx for head in others if head in known]
        # As much again of the error itself, as layers have it; heads' outputs, mostly, are the network's.
        S = metrics[name]
        S = S + np.eye(len(S)) * (np.trace(S) / len(S) or 1.0)
        found[name] = Uses(counts[name], S, 2 * np.sum(read, axis=0) if read else None)
    return found


def _with_costs(study: Study, tables: Mapping[str, Table]) -> dict[str, Table]:
    """Tables with what they cost, MACs as they are counted of the network with all of them factored."""
    weights, macs, before = study.weights, dict[str, int](), dict[str, int]()
    if tables and study.calibration is not None:
        work = workload(study.held)
        forms: dict[str, Form] = {
            weight_name(study.model, name): empty(_embedding(study, name), 1, rows=table.rows)
            for name, table in tables.items()
        }
        macs = sample_macs(apply(study.model, Plan(forms=forms)), work)
        before = sample_macs(study.model, work)
    found = {}
    for name, table in tables.items():
        (V, D), item, n = weights[name].shape, weights[name].itemsize, len(table.rows)

        def costs(params: float, macs: float, more: float = 0.0, item: int = item) -> dict[str, float]:
            return {"params": float(params), "macs": float(macs), "bytes": float(params * item + more)}

        def counted(*parts: str, of: Mapping[str, int] = macs) -> float:
            return float(sum(of.get(part, 0) for part in parts))

        heads = table.heads
        found[name] = replace(
            table,
            inner=costs(V - n, counted(*(f"{head}.outer" for head in heads))),
            outer=costs(D, counted(f"{name}.outer", *(f"{head}.inner" for head in heads))),
            fixed=costs(n * D, counted(*(f"{head}.exact" for head in heads))),
            once=costs(0, 0, 4.0 * V if n else 0.0),
            dense=costs(V * D, counted(*heads, of=before)),
        )
    return found


def linear_heads(study: Study, others: Sequence[str]) -> list[str]:
    """Layers that multiply with the weight they share."""
    return [name for name in others if isinstance(find_layer(study.model, name), nn.Linear)]


def _embedding(study: Study, name: str) -> nn.Embedding:
    layer = find_layer(study.model, name)
    assert isinstance(layer, nn.Embedding)
    return layer
