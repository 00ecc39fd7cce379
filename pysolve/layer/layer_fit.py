"""The fit of one layer: what every kind of compression gives it instead of its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from pysolve.correlations import Array
from pysolve.forms import Form


@dataclass(frozen=True, eq=False)
class LayerFit:
    """New weights M of one layer, and the bias b that goes with them.

    Parameters
    ----------
    weight : (h, d) array
        M; a convolution's as ``weight.flatten(1)``.
    bias : (h,) array or None
        b = E[y] − M E[x]; None where E[x] is not known.
    error : float
        E‖y − M x − b‖² / E‖y − E[y]‖², without the penalty; ‖W − M‖² / ‖W‖² where nothing is known of x.
    form : Sparse, LowRank, Codebook or Integers, optional
        How ``weight`` is stored, if not as a dense matrix.
    """

    weight: Array = field(repr=False)
    bias: Array | None = field(repr=False)
    error: float
    form: Form | None = field(default=None, repr=False)
