"""Channels within a target by the pieces that the budget is made of."""

from pysolve.errors import PysolveError
from pysolve.solve.budget import MEASURES, limits_of, site_sizes, unreachable
from pysolve.solve.knapsack import Knapsack, pack, solve


def allocate(costs, curves, targets, **sizes_allowed):
    """Channels that each site keeps: the least divergence within the targets."""
    rows, limits = limits_of(costs, targets)
    sizes, divergences = site_sizes(costs, curves, **sizes_allowed)
    smallest = costs.cost([row[0] for row in sizes])
    for measure, limit in zip(rows, limits, strict=True):
        if smallest[measure] > limit:
            raise PysolveError(unreachable(measure, limit, smallest[measure], costs.original[measure]))
    parts = (part[[MEASURES.index(measure) for measure in rows]] for part in costs.expansion())
    return solve(Knapsack(*pack(sizes, divergences), limits, *parts)).astype(int)
