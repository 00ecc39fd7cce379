"""What one unit of a network may become: its menu of sizes, and the task of fitting a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pysolve.correlations import Array, Correlations, Indices, Mask
from pysolve.layer.layer_fit import LayerFit
from pysolve.plan import Site

# Error, as a share of the outputs' energy, that counts as none: below, float32 forward passes measure noise.
FLOOR = 1e-9
# Errors at which the divergence that a unit causes is measured. ResNet-20 at 75 % of its MACs, divergence on
# test images: 0.0398, without the middle one 0.0432; a decoder at half: 0.0308 nats, and 0.0303; with 0.01 in
# the place of 0.02 0.0412 and 0.0326.
PROBED_ERRORS = (0.02, 0.07, 0.2)


@dataclass(frozen=True, eq=False)
class Task:
    """A layer to fit, on the inputs and outputs that it keeps.

    Parameters
    ----------
    name : str
    weight : (h, d) array
        Weights that are known to be good.
    correlations : Correlations, optional
        Of the inputs with the outputs wanted; None where nothing is known of them.
    outputs : (h,) int array
        Which of the original layer's outputs these are.
    previous : LayerFit, optional
        What this task gave before, where targets have moved since.
    places : (h, d) int array, optional
        Of a weight that is no layer of ``Study.layers``, and was cut: its entries' places in the whole one.
    """

    name: str
    weight: Array
    correlations: Correlations | None
    outputs: Indices
    previous: LayerFit | None = None
    places: Indices | None = None

    def without_data(self) -> Task:
        """The weights alone."""
        return replace(self, correlations=None)


Fit = Callable[[Task], LayerFit]


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a network is to become.

    Parameters
    ----------
    keep : {Site: (k,) int array}
        Channels that stay, ascending.
    fits : {layer or parameter: callable}
        New weights for a task, of every layer whose weight gets another form; the others are refitted as
        they are.
    """

    keep: Mapping[Site, Indices] = field(default_factory=dict)
    fits: Mapping[str, Fit] = field(default_factory=dict)

    def __or__(self, other: Chosen) -> Chosen:
        return Chosen({**self.keep, **other.keep}, {**self.fits, **other.fits})


@dataclass(frozen=True, eq=False)
class Menu:
    """Every size of one unit, a site or the weight of a layer.

    Parameters
    ----------
    unit : Site or str
    error : (n + 1,) array
        Error of the layers concerned at size 0 … n, as a share of their outputs' energy; above zero. The last
        size is the unit as it is.
    at : callable
        From a size to what is chosen.
    measured : {size: float}
        Divergence of the network's outputs with this unit alone at a size.
    seconds : float
        Spent on all of this.
    method : str
        How its sizes are chosen.
    allowed : (n + 1,) bool array, optional
        Sizes that it may have; all by default.
    """

    unit: Site | str
    error: Array
    at: Callable[[int], Chosen]
    measured: Mapping[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    method: str = ""
    allowed: Mask | None = None

    @property
    def whole(self) -> int:
        """The size of the unit as it is."""
        return len(self.error) - 1

    def probes(self, shares: Sequence[float] = PROBED_ERRORS) -> list[int]:
        """Sizes whose errors are next to those at which divergence is measured, and none where all may go."""
        found = (int(np.searchsorted(-self.error, -share)) for share in shares)
        least = self.unit.least if isinstance(self.unit, Site) else 1
        sizes = {max(least, 1, min(size, self.whole - 1)) for size in found}
        return sorted(sizes if least else {0, *sizes})

    @property
    def curve(self) -> Array:
        """(n + 1,) divergence to expect at every size, from what was measured so far.

        Infinite where a size is not allowed.
        """
        known = sorted(self.measured.items())
        found = divergence_curve(self.error, [k for k, _ in known], [value for _, value in known])
        return found if self.allowed is None else np.where(self.allowed, found, np.inf)


def divergence_curve(error: Array, sizes: Sequence[int], divergences: Sequence[float]) -> Array:
    """The divergence that every size causes, from measurements at a few sizes.

    Divergence is taken for a power of the error between neighbouring measurements, log-linear, and for the
    same power beyond the outer ones; the unit as it is causes none, and size 0 is not allowed unless it was
    measured. Neither are sizes up to one of infinite divergence.

    Parameters
    ----------
    error : (n + 1,) array
        Positive; of size 0 … n.
    sizes, divergences : sequences
        Where it was measured, and what was found.

    Returns
    -------
    (n + 1,) array
        Never rises with the size.
    """
    known = dict(zip(sizes, divergences, strict=True))
    nothing = known.pop(0, np.inf)
    least = max((size + 1 for size, value in known.items() if not np.isfinite(value)), default=0)
    known = {size: value for size, value in known.items() if np.isfinite(value)}
    at, error = np.array([*known], dtype=np.intp), np.log(error)
    if not len(at):
        found = np.where(np.arange(len(error)) < least, np.inf, 0.0)
        found[0] = nothing
        return found
    order = np.argsort(error[at], kind="stable")
    x, y = error[at][order], np.maximum.accumulate(np.log(np.maximum([*known.values()], FLOOR))[order])
    curve = np.interp(error, x, y)
    curve = np.where(error < x[0], y[0] + _power(x[:2], y[:2]) * (error - x[0]), curve)
    curve = np.where(error > x[-1], y[-1] + _power(x[-2:], y[-2:]) * (error - x[-1]), curve)
    found = np.maximum.accumulate(np.exp(curve)[::-1])[::-1]
    found[0], found[-1] = nothing, 0.0
    # Nothing at all is no point of the curve, whose other end it would move, but bounds it.
    found = np.minimum(found, nothing)
    found[1:least] = np.inf
    return found


def _power(x: Array, y: Array) -> float:
    """Slope between two points of a log-log curve, held to what makes sense; 1 when there is but one."""
    return float(np.clip((y[-1] - y[0]) / (x[-1] - x[0]), 0.5, 3.0)) if x[-1] > x[0] else 1.0
