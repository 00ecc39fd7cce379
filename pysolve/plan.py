"""What to do to a network, worked out before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Site:
    """A set of channels that can shrink: who makes them, who reads them.

    Parameters
    ----------
    writer, reader : str
        Names of the layer whose output channels these are, and of the layer that reads them.
    channels : int
        How many there are now.
    """

    writer: str
    reader: str
    channels: int


@dataclass(frozen=True, eq=False)
class Collapse:
    """Keep only some channels of a site, and optionally give its reader new weights for them.

    Parameters
    ----------
    site : Site
    keep : (k,) int array
        Channels that stay, ascending.
    weight : (h, k) array, optional
        The reader's weight on the kept channels; its old columns when not given.
    bias : (h,) array, optional
        The reader's new bias; its old one when not given.
    """

    site: Site
    keep: npt.NDArray[np.intp]
    weight: npt.NDArray[np.float64] | None = None
    bias: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Plan:
    """The steps that turn a network into its smaller version, in order."""

    steps: tuple[Collapse, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
