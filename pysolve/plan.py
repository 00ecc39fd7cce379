"""What to do to a network, worked out before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Site:
    """A set of channels that can shrink: which layers make them, which layers read them.

    Parameters
    ----------
    channels : int
        How many there are now.
    writers, readers : tuple of str
        Names of the layers whose output channels these are, and of the layers that read them.
    """

    channels: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Collapse:
    """Keep only some channels of a site, and optionally give its readers new weights for them.

    Parameters
    ----------
    site : Site
    keep : (k,) int array
        Channels that stay, ascending.
    weights : {reader: (h, k) array}
        New weights of a reader on the kept channels; a reader not named keeps its old columns.
    biases : {reader: (h,) array}
        New biases; a reader not named keeps its old one, or none.
    """

    site: Site
    keep: npt.NDArray[np.intp]
    weights: Mapping[str, Array] = field(default_factory=dict)
    biases: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep = np.asarray(self.keep, dtype=np.intp)
        object.__setattr__(self, "keep", keep)
        if keep.ndim != 1 or np.any(np.diff(keep) <= 0):
            raise ValueError("keep must list channel indices in ascending order, each once.")
        if keep.size and not 0 <= keep[0] <= keep[-1] < self.site.channels:
            raise ValueError(
                f"keep must lie within 0 … {self.site.channels - 1}, got {keep[0]} … {keep[-1]}."
            )
        strangers = (set(self.weights) | set(self.biases)) - set(self.site.readers)
        if strangers:
            raise ValueError(f"{sorted(strangers)} do not read these channels; readers: {self.site.readers}.")


@dataclass(frozen=True)
class Plan:
    """The steps that turn a network into its smaller version, in order."""

    steps: tuple[Collapse, ...] = ()
