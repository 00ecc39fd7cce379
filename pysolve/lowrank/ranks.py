"""Which rank each layer gets: the same for all, by the energy that is kept, or under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pysolve.budget import check_targets
from pysolve.choice import FLOOR, harm_curve
from pysolve.correlations import Array
from pysolve.errors import PysolveError
from pysolve.knapsack import Knapsack, pack, solve

Costs = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layer that could become two.

    Parameters
    ----------
    name : str
    kernel : tuple of int
        Of a convolution.
    spatial : bool
        Along height and width.
    error : (most + 1,) array
        Share of its outputs' energy that is lost at rank 0 … most, the largest rank at which two layers are
        smaller than one.
    each, dense : {"params", "macs", "bytes": number}
        What one rank costs, and what the layer's weight costs now.
    """

    name: str
    kernel: tuple[int, ...]
    spatial: bool
    error: Array
    each: Costs
    dense: Costs

    @property
    def most(self) -> int:
        """The largest rank that pays."""
        return len(self.error) - 1

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of the energy; most + 1 when none does."""
        enough = np.flatnonzero(self.error <= max(1 - energy, 1e-12))
        return max(1, int(enough[0])) if len(enough) else self.most + 1

    def curve(self, harms: Mapping[int, float]) -> Array:
        """(most + 2,) divergence to expect at rank 0 … most, and of the layer as it is."""
        error = np.minimum.accumulate(np.append(np.maximum(self.error, FLOOR), FLOOR))
        known = sorted(harms.items())
        return harm_curve(error, [k for k, _ in known], [harm for _, harm in known])


def most_useful(each: Costs, dense: Costs) -> int:
    """The largest rank that costs less than the layer does, in parameters, MACs and bytes."""
    return min(int(np.ceil(dense[measure] / each[measure])) - 1 for measure in each if each[measure] > 0)


def probed_ranks(candidate: Candidate, shares: Sequence[float]) -> list[int]:
    """Ranks whose errors are next to some shares."""
    found = (int(np.searchsorted(-candidate.error, -share)) for share in shares)
    return sorted({min(max(1, rank), candidate.most) for rank in found})


def share_ranks(
    candidates: Sequence[Candidate], curves: Sequence[Array], now: Costs, targets: Costs
) -> list[int | None]:
    """The ranks that do the least harm within the targets; None: the layer stays as it is.

    Parameters
    ----------
    candidates : sequence of Candidate
    curves : sequence of (most + 2,) arrays
        Of ``Candidate.curve``.
    now : {"params", "macs", "bytes": number}
        What the network costs.
    targets : {measure: share or number}

    Raises
    ------
    PysolveError
        When rank 1 of every layer costs more than a target.
    """
    check_targets(targets)
    limits = {measure: value * now[measure] if value <= 1 else value for measure, value in targets.items()}
    rest = {measure: now[measure] - sum(one.dense[measure] for one in candidates) for measure in limits}
    for measure, limit in limits.items():
        least = rest[measure] + sum(one.each[measure] for one in candidates)
        if least > limit >= 0:
            share = f"{100 * least / now[measure]:.3g} %"
            raise PysolveError(
                f"{measure} cannot go below {least:,.0f} ({share}), what rank 1 of all layers that can be "
                f"factored costs, but the target is {limit:,.0f}: raise it, or let channels go as well."
            )
    if not candidates:
        return []
    chosen = solve(_knapsack(candidates, curves, rest, limits))
    return [None if k > one.most else int(k) for one, k in zip(candidates, chosen, strict=True)]


def _knapsack(
    candidates: Sequence[Candidate], curves: Sequence[Array], rest: Costs, limits: Costs
) -> Knapsack:
    # A layer as it is counts as the rank that costs as much: of several measures, the larger one.
    whole = [max(one.dense[m] / one.each[m] for m in limits) for one in candidates]
    sizes = [np.append(np.arange(1.0, one.most + 1), k) for one, k in zip(candidates, whole, strict=True)]
    gradient = np.array([[one.each[m] for one in candidates] for m in limits])
    n = len(candidates)
    return Knapsack(
        *pack(sizes, [curve[1:] for curve in curves]),
        limits=np.array([*limits.values()], dtype=float),
        constant=np.array([rest[m] for m in limits], dtype=float),
        gradient=gradient,
        hessian=np.zeros((len(limits), n, n)),
    )
