"""Entries of a report (sites, layers, stages, convex solves) and the cells of their rows in tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Name of the row of costs that are in no layer of their own.
REST = "all others"


@dataclass(frozen=True)
class Latency:
    """Seconds of one call: median of repeated calls, and their quartiles ``low`` and ``high``."""

    median: float
    low: float
    high: float
    batch_size: int
    threads: int

    def __str__(self) -> str:
        return f"{1e3 * self.median:.2f} ms ({1e3 * self.low:.2f} … {1e3 * self.high:.2f})"


@dataclass(frozen=True)
class Solve:
    """A convex solve that chose channels of a site, with its independently computed certificate.

    Parameters
    ----------
    site, method : str
    lam : float
    kept : int
        Channels that are non-zero in its solution.
    relative_gap, kkt : float
        As in ``Certificate``.
    iterations : int
    seconds : float
    """

    site: str
    method: str
    lam: float
    kept: int
    relative_gap: float
    kkt: float
    iterations: int
    seconds: float
    HEAD = ("site", "method", "lam", "kept", "relative gap", "KKT", "iterations", "seconds")

    def cells(self) -> tuple[str, ...]:
        """A row under ``HEAD``."""
        found = (f"{self.lam:.3g}", f"{self.kept:,}", f"{self.relative_gap:.1e}", f"{self.kkt:.1e}")
        return (self.site, self.method, *found, f"{self.iterations}", f"{self.seconds:.3f}")


@dataclass(frozen=True)
class Expected:
    """What a target would cost, told before anything is cut.

    Parameters
    ----------
    target : {measure: number}
    divergence : float, optional
        To expect of the network's outputs from the original's; None where no sizes are within the target.
    """

    target: Mapping[str, float]
    divergence: float | None
    HEAD = ("target", "divergence to expect")

    def cells(self) -> tuple[str, ...]:
        """A row under ``HEAD``."""
        found = "out of reach" if self.divergence is None else f"{self.divergence:.3g}"
        return (in_words(self.target), found)


def in_words(target: Mapping[str, float]) -> str:
    """A target's measures and numbers."""
    return ", ".join(f"{m} {v:.4g}" if v <= 1 else f"{m} {v:,}" for m, v in target.items())


@dataclass(frozen=True)
class SiteReport:
    """Result of compressing one site.

    Parameters
    ----------
    name : str
    channels, kept : int
        Where pinned, the channels that the first writer makes.
    error : float
        E‖y − M x‖² / E‖y‖² of its readers, refitted on the original's inputs, mean over readers.
    predicted, measured : float, optional
        Divergence of the network's outputs with this site alone compressed: on the curve that the sizes were
        chosen by, and measured at the chosen size; None where sizes were given.
    seconds : float
        Spent on choosing its channels and measuring its curve.
    pinned : str, optional
        Why it could not shrink.
    curve : tuple of (int, float)
        Channels kept and the error, at some sizes.
    """

    name: str
    channels: int
    kept: int
    error: float = 0.0
    predicted: float | None = None
    measured: float | None = None
    seconds: float = 0.0
    pinned: str | None = None
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    HEAD = ("site", "kept", "error", "predicted div.", "measured div.", "seconds", "pinned because")

    def cells(self) -> tuple[str, ...]:
        """A row under ``HEAD``."""
        count = f"{self.kept}/{self.channels}"
        if self.pinned is not None:
            return (self.name, count, "", "", "", "", self.pinned)
        divergences = (formatted(self.predicted, ".2g"), formatted(self.measured, ".2g"))
        return (self.name, count, f"{self.error:.2%}", *divergences, f"{self.seconds:.2f}", "")


@dataclass(frozen=True)
class LayerReport:
    """Result of compressing the weight of one layer.

    Parameters
    ----------
    name : str
    density : float
        Share of the weights that is kept.
    layout : str
        Runtime layout: "dense", "sparse", "masked", "shared", or, factored, "rank 20" or "rank 20, spatial".
    why : str
        Reason for the layout.
    dense_seconds, new_seconds : float, optional
        Median time of its calls on a batch, where both were timed.
    error : float, optional
        E‖y − M x − b‖² / E‖y − E[y]‖² of a refitted layer, on the compressed network's inputs.
    bits : float, optional
        Entropy-coded bits per weight of a quantised layer.
    """

    name: str
    density: float
    layout: str
    why: str
    dense_seconds: float | None = None
    new_seconds: float | None = None
    error: float | None = None
    bits: float | None = None
    HEAD = ("layer", "kept", "bits", "error", "layout", "dense ms", "new ms", "reason")

    def cells(self) -> tuple[str, ...]:
        """A row under ``HEAD``."""
        times = map(_milliseconds, (self.dense_seconds, self.new_seconds))
        bits, error = formatted(self.bits, ".2f"), formatted(self.error, ".2%")
        return (self.name, f"{self.density:.1%}", bits, error, self.layout, *times, self.why)


@dataclass(frozen=True)
class Stage:
    """A network after one stage of several.

    Parameters
    ----------
    name : str
    bytes : int
        On disk, as the stage stores the network.
    weights : int
        Weights of the original's layers, over which bits are counted.
    divergence : float
        Of its outputs from the original's, on held-out samples.
    seconds : float
    score : float, optional
        Result of ``evaluate``.
    """

    name: str
    bytes: int
    weights: int
    divergence: float
    seconds: float = 0.0
    score: float | None = None
    HEAD = (
        "stage",
        "bytes",
        "of the original",
        "bits per weight",
        "divergence",
        "score",
        "seconds",
    )

    def cells(self, whole: int) -> tuple[str, ...]:
        """A row under ``HEAD``, of an original of ``whole`` bytes."""
        bits = f"{8 * self.bytes / max(1, self.weights):.2f}"
        share = f"1/{whole / self.bytes:.1f}" if self.bytes < whole else f"{self.bytes / whole:.3g}"
        last = (
            f"{self.divergence:.4g}",
            formatted(self.score, ".2f"),
            formatted(self.seconds or None, ".1f"),
        )
        return (self.name, f"{self.bytes:,}", share, bits, *last)


@dataclass(frozen=True)
class LayerMass:
    """Costs of one layer or of what a module multiplies outside of its layers, before and after.

    Parameters
    ----------
    name : str
    params, left : int
        Parameters of the original's layer, and those kept: not weights that are zero, but all of vectors and
        an embedding's rows of zeros.
    macs, macs_left : int
        For one sample.
    seconds, seconds_left : float, optional
        Time in the layer in the fastest of several runs of the network, on the largest batch that was timed.
    """

    name: str
    params: int
    left: int
    macs: int
    macs_left: int
    seconds: float | None = None
    seconds_left: float | None = None
    HEAD = ("layer", "parameters", "kept", "share", "of the total", "MACs", "kept", "ms", "now")

    def cells(self, total: int) -> tuple[str, ...]:
        """A row under ``HEAD``, with ``total`` parameters left in the network."""
        share = f"{self.left / self.params:.1%}" if self.params else ""
        counts = (f"{self.params:,}", f"{self.left:,}", share, f"{self.left / max(1, total):.1%}")
        times = map(_milliseconds, (self.seconds, self.seconds_left))
        return (self.name, *counts, f"{self.macs:,}", f"{self.macs_left:,}", *times)


def formatted(value: float | None, spec: str) -> str:
    """A number, or an empty cell where there is none."""
    return "" if value is None else format(value, spec)


def _milliseconds(seconds: float | None) -> str:
    return formatted(seconds and 1e3 * seconds, ".3f")
