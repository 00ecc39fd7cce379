"""Prune, factor or leave: channels and ranks under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from pysolve.correlations import Array
from pysolve.errors import PysolveError
from pysolve.methods.ranks import Candidate
from pysolve.plan import Indices
from pysolve.solve.budget import MEASURES, Costs, limits_of, site_sizes, unreachable
from pysolve.solve.knapsack import Knapsack, pack, solve

# Layers whose structure is looked at once more, those that cost most first.
TRIED = 32


def share(
    costs: Costs,
    site_curves: Sequence[Array],
    candidates: Sequence[Candidate],
    rank_curves: Sequence[Array],
    targets: Mapping[str, float],
) -> tuple[Indices, dict[str, int]]:
    """How many channels each site keeps, and which layers become two of which rank, for the least harm.

    Harms add up. What a layer costs as two, r (a · inputs + b · outputs), and as one, inputs · outputs, both
    depend on the channels that the sites around it keep. For a set of layers that may become two, channels
    and ranks are shared out together; the set itself is found by leaving out what stays as it is, and by
    trying the layers one by one.

    Parameters
    ----------
    costs : Costs
        Of the sites; lists the layers of all candidates.
    site_curves : sequence of (K_s + 1,) arrays
    candidates : sequence of Candidate
    rank_curves : sequence of (most + 2,) arrays
        Of ``Candidate.curve``.
    targets : {measure: share or number}

    Returns
    -------
    (S,) int array, {layer: rank}

    Raises
    ------
    PysolveError
        When even the smallest sizes cost more than a target: says how much.
    """
    search = _Search(costs, site_curves, candidates, rank_curves, targets)
    everything, nothing = frozenset(range(len(candidates))), frozenset[int]()
    best = search.settled(everything)
    # Alone within one measure, what a layer costs as it is counts exactly.
    if len(costs.channels) or len(targets) > 1:
        best = min(best, search.settled(nothing), key=search.harm)
        order = sorted(everything, key=lambda i: -max(candidates[i].dense.values()))
        for i in order[:TRIED]:
            best = min(best, search.settled(best ^ {i}), key=search.harm)
    if search.harm(best) == np.inf:
        raise PysolveError(search.complaint())
    return search.answer(best)


class _Search:
    """Harms of sets of layers that may become two, each solved once."""

    def __init__(
        self,
        costs: Costs,
        site_curves: Sequence[Array],
        candidates: Sequence[Candidate],
        rank_curves: Sequence[Array],
        targets: Mapping[str, float],
    ) -> None:
        self.costs, self.candidates, self.rank_curves = costs, candidates, rank_curves
        self.rows, self.limits = limits_of(costs, targets)
        self.which = [MEASURES.index(measure) for measure in self.rows]
        self.sizes, self.harms = site_sizes(costs, site_curves)
        self.solved: dict[frozenset[int], tuple[float, Array]] = {}

    def harm(self, chosen: frozenset[int]) -> float:
        """What the best sizes do with this set of layers; infinite where none are within the targets."""
        return self._solve(chosen)[0]

    def settled(self, chosen: frozenset[int]) -> frozenset[int]:
        """The set without layers that stay as they are: counted as one, they cost less."""
        while True:
            dense = {i for i, k in self._ranks(chosen).items() if k > self.candidates[i].most}
            if not dense or self.harm(chosen - dense) > self.harm(chosen):
                return chosen
            chosen = chosen - dense

    def answer(self, chosen: frozenset[int]) -> tuple[Indices, dict[str, int]]:
        """Sizes of the sites, and ranks."""
        sizes = self._solve(chosen)[1]
        ranks = {
            self.candidates[i].name: int(k)
            for i, k in self._ranks(chosen).items()
            if k <= self.candidates[i].most
        }
        return sizes[: len(self.costs.channels)].astype(np.intp), ranks

    def complaint(self) -> str:
        """Which target is out of reach."""
        everything = [*range(len(self.candidates))]
        least = _with_ranks(self.costs, [*self.candidates]).cost(self._smallest(everything))
        now = self.costs.original
        for measure, limit in zip(self.rows, self.limits, strict=True):
            if least[measure] > limit:
                return unreachable(measure, limit, least[measure], now[measure])
        return "no sizes are within all targets together: raise one of them."

    def _smallest(self, order: Sequence[int]) -> Array:
        return np.array([row[0] for row in self.sizes] + [1.0] * len(order))

    def _ranks(self, chosen: frozenset[int]) -> dict[int, float]:
        sizes = self._solve(chosen)[1]
        return dict(zip(sorted(chosen), sizes[len(self.costs.channels) :].tolist(), strict=False))

    def _solve(self, chosen: frozenset[int]) -> tuple[float, Array]:
        if chosen not in self.solved:
            self.solved[chosen] = self._solved(sorted(chosen))
        return self.solved[chosen]

    def _solved(self, order: Sequence[int]) -> tuple[float, Array]:
        factored = [self.candidates[i] for i in order]
        costs = _with_ranks(self.costs, factored)
        sizes, harms = [*self.sizes], [*self.harms]
        for i, one in zip(order, factored, strict=True):
            # A layer as it is counts as the rank that costs as much: of several measures, the larger one.
            whole = max(one.dense[measure] / one.each[measure] for measure in self.rows)
            sizes.append(np.append(np.arange(1.0, one.most + 1), max(whole, one.most + 1e-6)))
            harms.append(np.maximum.accumulate(self.rank_curves[i][:0:-1])[::-1])
        least = costs.cost([row[0] for row in sizes])
        if not sizes or any(least[m] > limit for m, limit in zip(self.rows, self.limits, strict=True)):
            fits = not sizes and all(
                least[m] <= limit for m, limit in zip(self.rows, self.limits, strict=True)
            )
            return (0.0 if fits else np.inf), np.zeros(len(sizes))
        parts = (part[self.which] for part in costs.expansion())
        found = solve(Knapsack(*pack(sizes, harms), self.limits, *parts))
        pairs = zip(sizes, harms, found, strict=True)
        return float(sum(harm[int(np.argmin(np.abs(row - k)))] for row, harm, k in pairs)), found


def _with_ranks(costs: Costs, factored: Sequence[Candidate]) -> Costs:
    """Costs with a further site for each layer that becomes two: the channels between."""
    F, (L, S) = len(factored), costs.rows.shape
    own = [costs.layers.index(one.name) for one in factored]
    widths = np.array([one.most + 1 for one in factored], dtype=np.intp)
    between, none = np.eye(F), np.zeros((F, F))
    product = costs.product.copy()
    product[:, own] = 0.0
    inner, outer = (
        np.array([[getattr(one, part)[m] for one in factored] for m in MEASURES]).reshape(len(MEASURES), F)
        for part in ("inner", "outer")
    )
    zeros = np.zeros((len(MEASURES), 2 * F))
    return replace(
        costs,
        channels=np.concatenate([costs.channels, widths]),
        outputs=np.concatenate([costs.outputs, widths, costs.outputs[own]]),
        inputs=np.concatenate([costs.inputs, costs.inputs[own], widths]),
        rows=np.block([[costs.rows, np.zeros((L, F))], [np.zeros((F, S)), between], [costs.rows[own], none]]),
        columns=np.block(
            [[costs.columns, np.zeros((L, F))], [costs.columns[own], none], [np.zeros((F, S)), between]]
        ),
        product=np.hstack([product, inner / costs.inputs[own], outer / costs.outputs[own]]),
        per_output=np.hstack([costs.per_output, zeros]),
        per_input=np.hstack([costs.per_input, zeros]),
    )
