"""A layer that could become two: what it loses and costs at every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pysolve.correlations import Array
from pysolve.layer.reduced_rank import rank_keeping
from pysolve.methods.choice import FLOOR, harm_curve

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
    inner, outer, dense : {"params", "macs", "bytes": number}
        What one rank costs in each of the two, and what the layer's weight costs now.
    """

    name: str
    kernel: tuple[int, ...]
    spatial: bool
    error: Array
    inner: Costs
    outer: Costs
    dense: Costs

    @property
    def each(self) -> dict[str, float]:
        """What one rank costs."""
        return {measure: self.inner[measure] + self.outer[measure] for measure in self.dense}

    @property
    def most(self) -> int:
        """The largest rank that pays."""
        return len(self.error) - 1

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of the energy; most + 1 when none does."""
        return rank_keeping(self.error, energy)

    def curve(self, harms: Mapping[int, float]) -> Array:
        """(most + 2,) divergence to expect at rank 0 … most, and of the layer as it is."""
        error = np.minimum.accumulate(np.append(np.maximum(self.error, FLOOR), FLOOR))
        known = sorted(harms.items())
        return harm_curve(error, [k for k, _ in known], [harm for _, harm in known])


def most_useful(inner: Costs, outer: Costs, dense: Costs) -> int:
    """The largest rank that costs less than the layer does, in parameters, MACs and bytes."""
    return min(int(np.ceil(dense[what] / (inner[what] + outer[what]))) - 1 for what in dense)


def probed_ranks(candidate: Candidate, shares: Sequence[float]) -> list[int]:
    """Ranks whose errors are next to some shares."""
    found = (int(np.searchsorted(-candidate.error, -share)) for share in shares)
    return sorted({min(max(1, rank), candidate.most) for rank in found})
