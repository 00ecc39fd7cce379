"""What a report says of one site, one layer, one convex solve: data, and the cells of a table's row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Latency:
    """Seconds that one call takes: the median of repeated calls, and their quartiles ``low`` and ``high``."""

    median: float
    low: float
    high: float
    batch_size: int
    threads: int

    def __str__(self) -> str:
        return f"{1e3 * self.median:.2f} ms ({1e3 * self.low:.2f} … {1e3 * self.high:.2f})"


@dataclass(frozen=True)
class Solve:
    """A convex solve that chose channels of a site, and its certificate by code that no solver shares.

    Parameters
    ----------
    site : str
    method : str
    lam : float
    kept : int
        Channels that are not zero in its solution.
    relative_gap, kkt : float
        As ``Certificate`` has them.
    iterations : int
    seconds : float
    """

    HEAD: ClassVar = ("site", "method", "lam", "kept", "relative gap", "KKT", "iterations", "seconds")

    def cells(self) -> tuple[str, ...]:
        """A row under ``HEAD``."""
        return (
            self.site,
            self.method,
            f"{self.lam:.3g}",
            f"{self.kept:,}",
            f"{self.relative_gap:.1e}",
            f"{self.kkt:.1e}",
            f"{self.iterations}",
            f"{self.seconds:.3f}",
        )

    site: str
    method: str
    lam: float
    kept: int
    relative_gap: float
    kkt: float
    iterations: int
    seconds: float


@dataclass(frozen=True)
class SiteReport:
    """What happened to one site.

    Parameters
    ----------
    name : str
    channels, kept : int
    error : float
        E‖y − M x‖² / E‖y‖² of its readers, refitted on the original's inputs, mean over readers.
    predicted, measured : float, optional
        Divergence of the network's outputs with this site alone compressed: from the curve that the budget
        used, and measured at the size it chose; None where sizes were given.
    seconds : float
        Spent on choosing its channels and measuring its curve.
    pinned : str, optional
        Why it could not shrink.
    curve : tuple of (int, float)
        Channels kept and the error then, at some sizes.
    """

    HEAD: ClassVar = ("site", "kept", "error", "predicted", "measured", "seconds", "cannot shrink, because")

    def cells(self) -> tuple[str, ...]:
        """A row under ``HEAD``."""
        count = f"{self.kept}/{self.channels}"
        if self.pinned is not None:
            return (self.name, count, "", "", "", "", self.pinned)
        harms = ("" if one is None else f"{one:.2g}" for one in (self.predicted, self.measured))
        return (self.name, count, f"{self.error:.2%}", *harms, f"{self.seconds:.2f}", "")

    name: str
    channels: int
    kept: int
    error: float = 0.0
    predicted: float | None = None
    measured: float | None = None
    seconds: float = 0.0
    pinned: str | None = None
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class LayerReport:
    """What happened to the weight of one layer.

    Parameters
    ----------
    name : str
    density : float
        Share of the weights that are left.
    layout : str
        How the layer runs now: "dense", "csr", "mask", or "rank 20", "rank 20, spatial" as two layers.
    why : str
    dense_seconds, new_seconds : float, optional
        Median of its calls on a batch, where both were timed.
    error : float, optional
        E‖y − M x − b‖² / E‖y − E[y]‖² of a layer that was refitted, on the compressed network's inputs.
    bits : float, optional
        That entropy coding takes for each weight of a layer that was quantised.
    """

    HEAD: ClassVar = ("layer", "left", "bits", "error", "runs", "dense ms", "new ms", "why")

    def cells(self) -> tuple[str, ...]:
        """A row under ``HEAD``."""
        times = map(_milliseconds, (self.dense_seconds, self.new_seconds))
        error = "" if self.error is None else f"{self.error:.2%}"
        bits = "" if self.bits is None else f"{self.bits:.2f}"
        return (self.name, f"{self.density:.1%}", bits, error, self.layout, *times, self.why)

    name: str
    density: float
    layout: str
    why: str
    dense_seconds: float | None = None
    new_seconds: float | None = None
    error: float | None = None
    bits: float | None = None


@dataclass(frozen=True)
class Stage:
    """What a network was after one stage of several.

    Parameters
    ----------
    name : str
    bytes : int
        That this stage's network takes on a disk as the stage stores it.
    weights : int
        Weights of the original's layers: what bits are counted over.
    divergence : float
        Of its outputs from the original's, on samples held back.
    seconds : float
    score : float, optional
        What ``evaluate`` gave.
    """

    HEAD: ClassVar = ("stage", "bytes", "of the original", "bits a weight", "divergence", "score", "seconds")

    def cells(self, whole: int) -> tuple[str, ...]:
        """A row under ``HEAD``, of an original of ``whole`` bytes."""
        bits = f"{8 * self.bytes / max(1, self.weights):.2f}"
        share = f"1/{whole / self.bytes:.1f}" if self.bytes < whole else f"{self.bytes / whole:.3g}"
        score = "" if self.score is None else f"{self.score:.2f}"
        times = f"{self.seconds:.1f}" if self.seconds else ""
        return (self.name, f"{self.bytes:,}", share, bits, f"{self.divergence:.4g}", score, times)

    name: str
    bytes: int
    weights: int
    divergence: float
    seconds: float = 0.0
    score: float | None = None


@dataclass(frozen=True)
class LayerMass:
    """What one layer weighs, before and after.

    Parameters
    ----------
    name : str
    params, left : int
        Parameters of the original's layer, and those that are left and not zero.
    macs, macs_left : int
        For one sample.
    seconds, seconds_left : float, optional
        Time in the layer in the fastest of several runs of the network, on the largest batch that was timed.
    """

    HEAD: ClassVar = ("layer", "parameters", "left", "share", "of the total", "MACs", "left", "ms", "now")

    def cells(self, total: int) -> tuple[str, ...]:
        """A row under ``HEAD``, with ``total`` parameters left in the network."""
        share = f"{self.left / self.params:.1%}" if self.params else ""
        counts = (f"{self.params:,}", f"{self.left:,}", share, f"{self.left / max(1, total):.1%}")
        times = map(_milliseconds, (self.seconds, self.seconds_left))
        return (self.name, *counts, f"{self.macs:,}", f"{self.macs_left:,}", *times)

    name: str
    params: int
    left: int
    macs: int
    macs_left: int
    seconds: float | None = None
    seconds_left: float | None = None


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}"
