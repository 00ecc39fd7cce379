"""Sizes of all units under one target: channels and ranks by their divergences, for what they really cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import numpy as np

from pysolve.correlations import Array
from pysolve.errors import PysolveError
from pysolve.methods.kinds.ranks import RankMenu
from pysolve.methods.menu import Chosen, Menu
from pysolve.methods.price import Probe, divergence_of, measured
from pysolve.methods.study import Study
from pysolve.nn.cost.costs import cost_model
from pysolve.nn.cost.per_sample import workload
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.solve.budget import Costs, limits_of, site_sizes, unreachable
from pysolve.solve.knapsack import Knapsack, pack, solve

# Measured divergence may exceed the predicted one so many times; otherwise sizes are chosen anew, so often.
TRUSTED_RATIO, MAX_ROUNDS = 1.1, 6
# Layers whose structure is looked at once more, those that cost most first.
TRIED = 32

Target = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Settled:
    """Sizes of all units within a target.

    Parameters
    ----------
    sites, layers : sequences of Menu and RankMenu
        With all that was measured.
    sizes : list of int
        Channels that each site keeps.
    ranks : {layer: int}
        Of the layers that are factored.
    predicted : list of float
        Divergence that was expected of each site.
    chosen : Chosen
        What all of that makes of the network.
    """

    sites: Sequence[Menu]
    layers: Sequence[RankMenu]
    sizes: list[int]
    ranks: dict[str, int]
    predicted: list[float]
    chosen: Chosen


def settle(
    study: Study,
    costs: Costs,
    sites: Sequence[Menu],
    layers: Sequence[RankMenu],
    target: Target,
    where: Probe,
) -> Settled:
    """Sizes within the target, measured, and chosen anew until no prediction is far off.

    Raises
    ------
    PysolveError
        As ``choose``.
    """
    tried: list[Settled] = []
    for _ in range(MAX_ROUNDS):
        sizes, ranks = choose(costs, sites, layers, target)
        if tried and (sizes, ranks) == (tried[-1].sizes, tried[-1].ranks):
            break
        wanted = [*sizes, *(ranks.get(str(menu.unit), menu.whole) for menu in layers)]
        menus = [*zip([*sites, *layers], wanted, strict=True)]
        expected = [float(menu.curve[k]) for menu, k in menus]
        found = measured(study, [(menu, [k]) for menu, k in menus], where)
        sites, layers = found[: len(sites)], [m for m in found[len(sites) :] if isinstance(m, RankMenu)]
        chosen = reduce(or_, (menu.at(k) for menu, k in menus if k < menu.whole), Chosen())
        tried.append(Settled(sites, layers, sizes, ranks, expected[: len(sites)], chosen))
        seen = sum(menu.measured[k] for menu, k in zip(found, wanted, strict=True))
        if seen <= TRUSTED_RATIO * sum(expected):
            break
    if len(tried) == 1:
        return tried[0]
    # Divergences do not quite add up: of sizes that were chosen on curves that far off, the best together.
    return min(tried, key=lambda one: divergence_of(study, one.chosen, where))


def costs_of(study: Study, *, also: Sequence[str] = ()) -> Costs:
    """What the network costs at any width of its sites."""
    work, original = workload(study.held), study.original
    found = cost_model(study.model, study.free, work, extra_biases=study.new_biases, also=also)
    # Shares refer to the user's network, which may share values that this one does not.
    more = [parameters(study.model) - parameters(original), 0.0, nbytes(study.model) - nbytes(original)]
    return replace(found, added=found.added + np.array(more))


def choose(
    costs: Costs, sites: Sequence[Menu], layers: Sequence[RankMenu], target: Target
) -> tuple[list[int], dict[str, int]]:
    """Channels that each site keeps, and ranks of the layers that are factored, for the least divergence.

    Divergences add up. What a layer costs as two, r (a · inputs + b · outputs), and as one, inputs · outputs,
    both depend on the channels that the sites around it keep. For a set of layers that may be factored,
    channels and ranks are shared out together; the set itself is found by leaving out what stays as it is,
    and by trying the layers one by one.

    Parameters
    ----------
    costs : Costs
        Of the sites; lists all layers that may be factored.
    sites : sequence of Menu
    layers : sequence of RankMenu
    target : {measure: share or number}

    Raises
    ------
    PysolveError
        When even the smallest sizes cost more than a target: says how much.
    """
    search = _Search(costs, [menu.curve for menu in sites], layers, target)
    everything, nothing = frozenset(range(len(layers))), frozenset[int]()
    best = search.settled(everything)
    # Alone within one measure, what a layer costs as it is counts exactly.
    if layers and (len(costs.channels) or len(target) > 1):
        best = min(best, search.settled(nothing), key=search.divergence)
        order = sorted(everything, key=lambda i: -max(layers[i].dense.values()))
        for i in order[:TRIED]:
            best = min(best, search.settled(best ^ {i}, best), key=search.divergence)
    if search.divergence(best) == np.inf:
        raise PysolveError(search.complaint())
    return search.answer(best)


class _Search:
    """Divergences of sets of layers that may be factored, each solved once."""

    def __init__(
        self, costs: Costs, curves: Sequence[Array], layers: Sequence[RankMenu], target: Target
    ) -> None:
        self.costs, self.layers = costs, layers
        self.rows, self.limits = limits_of(costs, target)
        self.which = [costs.measures.index(measure) for measure in self.rows]
        self.sizes, self.divergences = site_sizes(costs, curves, least=0)
        self.solved: dict[frozenset[int], tuple[float, Array]] = {}

    def divergence(self, chosen: frozenset[int]) -> float:
        """What the best sizes cause with this set of layers; infinite where none are within the target."""
        return self._solve(chosen)[0]

    def settled(self, chosen: frozenset[int], near: frozenset[int] | None = None) -> frozenset[int]:
        """The set without layers that stay as they are: counted as one, they cost less.

        ``near``: a set that was solved, whose sizes the search starts from.
        """
        self._solve(chosen, near)
        while True:
            dense = {i for i, k in self._ranks(chosen).items() if k > self.layers[i].most}
            if not dense:
                return chosen
            self._solve(chosen - dense, chosen)
            if self.divergence(chosen - dense) > self.divergence(chosen):
                return chosen
            chosen = chosen - dense

    def answer(self, chosen: frozenset[int]) -> tuple[list[int], dict[str, int]]:
        """Sizes of the sites, and ranks."""
        sizes = self._solve(chosen)[1]
        ranks = {
            str(self.layers[i].unit): int(k)
            for i, k in self._ranks(chosen).items()
            if k <= self.layers[i].most
        }
        return [int(k) for k in sizes[: len(self.costs.channels)]], ranks

    def complaint(self) -> str:
        """Which target is out of reach."""
        smallest = np.array([row[0] for row in self.sizes] + [1.0] * len(self.layers))
        least, now = _with_ranks(self.costs, self.layers).cost(smallest), self.costs.original
        for measure, limit in zip(self.rows, self.limits, strict=True):
            if least[measure] > limit:
                said = unreachable(measure, limit, least[measure], now[measure])
                return (
                    said
                    if self.layers
                    else f"{said} low_rank(prune=True) factors layers and embeddings, too."
                )
        return "no sizes are within all targets together: raise one of them."

    def _ranks(self, chosen: frozenset[int]) -> dict[int, float]:
        sizes = self._solve(chosen)[1]
        return dict(zip(sorted(chosen), sizes[len(self.costs.channels) :].tolist(), strict=False))

    def _solve(self, chosen: frozenset[int], near: frozenset[int] | None = None) -> tuple[float, Array]:
        if chosen not in self.solved:
            start = None if near is None or self.divergence(near) == np.inf else self._near(chosen, near)
            self.solved[chosen] = self._solved(sorted(chosen), start)
        return self.solved[chosen]

    def _near(self, chosen: frozenset[int], near: frozenset[int]) -> Array:
        """Sizes for a set from those of another; layers that it does not have begin as they are."""
        sites, known = self._solve(near)[1][: len(self.costs.channels)], self._ranks(near)
        return np.array([*sites, *(known.get(i, np.inf) for i in sorted(chosen))])

    def _solved(self, order: Sequence[int], near: Array | None) -> tuple[float, Array]:
        factored = [self.layers[i] for i in order]
        costs = _with_ranks(self.costs, factored)
        sizes, divergences = [*self.sizes], [*self.divergences]
        for one in factored:
            # A layer as it is counts as the rank that costs as much: of several measures, the larger one.
            whole = max(one.saved[measure] / one.each[measure] for measure in self.rows)
            sizes.append(np.append(np.arange(1.0, one.most + 1), max(whole, one.most + 1e-6)))
            divergences.append(np.maximum.accumulate(one.curve[:0:-1])[::-1])
        least = costs.cost([row[0] for row in sizes])
        fits = all(least[m] <= limit for m, limit in zip(self.rows, self.limits, strict=True))
        if not sizes or not fits:
            return (0.0 if fits else np.inf), np.zeros(len(sizes))
        parts = (part[self.which] for part in costs.expansion())
        problem = Knapsack(*pack(sizes, divergences), self.limits, *parts)
        found = solve(replace(problem, seen=self._seen(sizes)), near)
        rows = zip(sizes, divergences, found, strict=True)
        return float(sum(values[int(np.argmin(np.abs(row - k)))] for row, values, k in rows)), found

    def _seen(self, sizes: Sequence[Array]) -> Array | None:
        """What sizes of the sites count as in each measure."""
        if not self.costs.seen or "ms" not in self.rows:
            return None
        seen = [row[k.astype(np.intp)] for row, k in zip(self.costs.seen, sizes, strict=True)]
        return np.array([pack(seen if measure == "ms" else sizes, sizes)[0] for measure in self.rows])


def _with_ranks(costs: Costs, factored: Sequence[RankMenu]) -> Costs:
    """Costs with a further site for each factored layer: the channels between its factors."""
    F, (L, S) = len(factored), costs.rows.shape
    own = [costs.layers.index(one.names[0]) for one in factored]
    shared = [costs.layers.index(name) for one in factored for name in one.names]
    widths = np.array([one.most + 1 for one in factored], dtype=np.intp)
    between, none = np.eye(F), np.zeros((F, F))
    product = costs.product.copy()
    product[:, shared] = 0.0
    for i, one in ((i, one) for i, one in zip(own, factored, strict=True) if one.gates):
        # MACs of recurrent layers are counted beside their weights.
        dense = np.array([one.dense[m] for m in costs.measures])
        product[:, i] = costs.product[:, i] - dense / (costs.outputs[i] * costs.inputs[i])
    M = len(costs.measures)
    per_output, constant = costs.per_output.copy(), costs.constant
    # Rows of an embedding, which has no inputs, cost as much for each of its outputs.
    width = np.maximum(costs.inputs[own], 1.0)
    for i, table in ((i, one.table) for i, one in zip(own, factored, strict=True) if one.table is not None):
        per_output[:, i] = np.array([table.fixed[m] for m in costs.measures]) / costs.outputs[i]
        constant = constant + np.array([table.once[m] for m in costs.measures])
    inner, outer = (
        np.array([[getattr(one, part)[m] for one in factored] for m in costs.measures]).reshape(M, F)
        for part in ("inner", "outer")
    )
    zeros = np.zeros((M, 2 * F))
    return replace(
        costs,
        channels=np.concatenate([costs.channels, widths]),
        outputs=np.concatenate([costs.outputs, widths, costs.outputs[own]]),
        inputs=np.concatenate([costs.inputs, width, widths]),
        rows=np.block([[costs.rows, np.zeros((L, F))], [np.zeros((F, S)), between], [costs.rows[own], none]]),
        columns=np.block(
            [[costs.columns, np.zeros((L, F))], [costs.columns[own], none], [np.zeros((F, S)), between]]
        ),
        product=np.hstack([product, inner / width, outer / costs.outputs[own]]),
        per_output=np.hstack([per_output, zeros]),
        constant=constant,
        per_input=np.hstack([costs.per_input, zeros]),
        gradient=np.pad(costs.gradient, ((0, 0), (0, F))),
        hessian=np.pad(costs.hessian, ((0, 0), (0, F), (0, F))),
    )
