"""What a compression did, in numbers that print and that go into files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from textwrap import wrap
from typing import Any

# Columns of what is printed.
_WIDTH = 110


@dataclass(frozen=True)
class SiteReport:
    """What happened to one site.

    Parameters
    ----------
    name : str
    channels, kept : int
    error : float
        E‖y − M x‖² / E‖y‖² of its readers, refitted on the original's inputs, mean over readers.
    predicted, measured : float
        Divergence of the network's outputs with this site alone compressed: from the curve that the budget
        used, and measured at the size it chose.
    seconds : float
        Spent on choosing its channels and measuring its curve.
    pinned : str, optional
        Why it could not shrink.
    """

    name: str
    channels: int
    kept: int
    error: float = 0.0
    predicted: float = 0.0
    measured: float = 0.0
    seconds: float = 0.0
    pinned: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """What happened to the weight of one layer.

    Parameters
    ----------
    name : str
    density : float
        Share of the weights that are left.
    layout : "dense" or "sparse"
        How the layer runs now.
    why : str
    dense_seconds, sparse_seconds : float, optional
        Median of its calls on a batch, where both were timed.
    """

    name: str
    density: float
    layout: str
    why: str
    dense_seconds: float | None = None
    sparse_seconds: float | None = None


@dataclass(frozen=True)
class Report:
    """What a compression did.

    Parameters
    ----------
    before, after : {"params", "macs", "bytes" or "nonzeros": int}
        Costs of the two networks; MACs for one sample.
    sites : tuple of SiteReport
    divergence : float
        Of the compressed network's outputs from the original's, on samples held back.
    samples, held : int
        Samples that the refit used and that the divergence was measured on.
    score_before, score_after : float, optional
        What ``evaluate`` gave for the two networks.
    retrained : float, optional
        What it gave after retraining.
    seconds : {stage: float}
    notes : tuple of str
        What else the user should know.
    target : {"params", "macs" or "bytes": number}, optional
        What was asked for, in the words of ``compress``.
    layers : tuple of LayerReport
        Of weights that were pruned one by one.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    sites: tuple[SiteReport, ...]
    divergence: float
    samples: int
    held: int
    score_before: float | None = None
    score_after: float | None = None
    retrained: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    target: Mapping[str, float] | None = None
    layers: tuple[LayerReport, ...] = ()

    def share(self, measure: str) -> float:
        """What is left of a measure, as a share of the original's."""
        return self.after[measure] / self.before[measure] if self.before[measure] else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dictionaries."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [_costs(self), *_scores(self), "", *_site_lines(self.sites), *_layer_lines(self.layers)]
        for note in self.notes:
            lines += wrap(f"Note: {note}", _WIDTH, subsequent_indent="      ", break_on_hyphens=False)
        total = sum(self.seconds.values())
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        return "\n".join([*lines, f"{total:.1f} s: {stages}"] if self.seconds else lines)


def _costs(report: Report) -> str:
    labels = {"params": "parameters", "nonzeros": "non-zeros", "macs": "MACs", "bytes": "bytes"}
    return "\n".join(
        f"{label:<11}{report.before[measure]:>15,} → {report.after[measure]:>13,}"
        f"{100 * report.share(measure):>8.1f} %"
        for measure, label in labels.items()
        if measure in report.before
    )


def _scores(report: Report) -> list[str]:
    lines = []
    if report.target is not None:
        asked = [f"{m} {v:.4g}" if v <= 1 else f"{m} {v:,}" for m, v in report.target.items()]
        lines.append(f"target     {', '.join(asked)}")
    used = f", refitted on {report.samples}" if report.samples else ""
    if report.held:
        lines.append(f"divergence {report.divergence:.4g} on {report.held} samples held back{used}")
    if report.score_before is not None and report.score_after is not None:
        retrained = "" if report.retrained is None else f", retrained {report.retrained:.2f}"
        lines.append(f"score      {report.score_before:.2f} → {report.score_after:.2f}{retrained}")
    return lines


def _site_lines(sites: tuple[SiteReport, ...]) -> list[str]:
    if not sites:
        return []
    counts = [f"{site.kept}/{site.channels}" for site in sites]
    room = max(11, *map(len, counts))
    width = min(_WIDTH - room - 42, max(len(site.name) for site in sites))
    lines = [
        f"{'site':<{width}}  {'kept':>{room}}  {'error':>8}  {'predicted':>9}  {'measured':>8}  {'s':>7}"
    ]
    for site, count in zip(sites, counts, strict=True):
        name = site.name if len(site.name) <= width else site.name[: width - 1] + "…"
        start = f"{name:<{width}}  {count:>{room}}  "
        if site.pinned is not None:
            first, *more = wrap(site.pinned, _WIDTH - len(start), break_on_hyphens=False) or [""]
            lines += [start + first, *(" " * len(start) + line for line in more)]
            continue
        lines.append(
            f"{start}{site.error:>8.2%}  {site.predicted:>9.2g}  {site.measured:>8.2g}  {site.seconds:>7.2f}"
        )
    return lines


def _layer_lines(layers: tuple[LayerReport, ...]) -> list[str]:
    if not layers:
        return []
    width = max(5, *(len(layer.name) for layer in layers))
    lines = [f"{'layer':<{width}}  {'left':>7}  {'runs':<6}  {'dense ms':>9}  {'sparse ms':>9}  why"]
    for layer in layers:
        times = [
            "" if seconds is None else f"{1e3 * seconds:.3f}"
            for seconds in (layer.dense_seconds, layer.sparse_seconds)
        ]
        lines.append(
            f"{layer.name:<{width}}  {layer.density:>7.1%}  {layer.layout:<6}  {times[0]:>9}  {times[1]:>9}  "
            f"{layer.why}"
        )
    return lines
