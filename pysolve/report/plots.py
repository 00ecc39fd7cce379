"""Plots of compressed networks, drawn with matplotlib's object interface: no display is needed.

Every function draws into ``ax``, by default in a new figure, and returns the Axes; ``path`` saves the figure
in the format that its ending names (png, svg, pdf).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from pysolve.correlations import Array
from pysolve.report import drawing
from pysolve.report.curves import Curve, Results, error_curves, front, histograms, histories_of, scored
from pysolve.report.drawing import COLORS, INK, NAMED, Path
from pysolve.report.report import Report, check_report
from pysolve.solve.elimination import EliminationPath
from pysolve.solve.solution import History, Solution

_MEASURES = {
    "params": "parameters",
    "macs": "MACs",
    "bytes": "bytes",
    "file": "bytes on disk",
    "nonzeros": "non-zeros",
}
_DASHES = (0, (4, 3))


def plot_pareto(
    reports: Results | Mapping[str, Results],
    path: Path | None = None,
    *,
    measure: str = "params",
    score: str = "score",
    lower_is_better: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Plot score, or divergence, against size with the Pareto front of each method; returns the Axes.

    A solid line joins the Pareto-optimal results, a dashed one those after retraining; dominated results are
    faint points. The star at 100 % is the dense network.

    Parameters
    ----------
    reports : list of Compressed or Report, or {label: such a list}
        Results of ``sweep``; of several methods, with a label each. Of results without ``evaluate`` the
        divergence is drawn.
    path, ax : optional
    measure : "params", "macs", "bytes" or another that the reports have
        Cost on the axis, which is logarithmic where less than an eighth is left.
    score : str
        Label of the axis: the quantity that ``evaluate`` returns, with its unit.
    lower_is_better : bool
        For scores such as perplexity.

    Raises
    ------
    TypeError
        When one result is passed instead of a list.
    ValueError
        When there are no reports, or one lacks the measure or a score that others have.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> results = ps.sweep(model, batches, targets=[{"params": 0.5}, {"params": 0.25}], latency=False)
    >>> axes = ps.plot_pareto(results, "pareto.png")
    """
    methods = scored(reports, measure)
    every = [one for runs in methods.values() for one in runs]
    by_score = every[0].score_after is not None
    lower_is_better, score = (lower_is_better, score) if by_score else (True, "divergence")
    ax = ax or drawing.new_axes()
    for (label, runs), (color, marker) in zip(methods.items(), drawing.styles(), strict=False):
        shares = [100 * one.share(measure) for one in runs]
        plain = [one.score_after if by_score else one.divergence for one in runs]
        retrained = [one.retrained for one in runs]
        _draw_front(ax, front(shares, plain, lower_is_better), color, marker, label)
        later = front(shares, retrained, lower_is_better)
        _draw_front(ax, later, color, marker, f"{label}, retrained", dashed=True)
    dense = sorted({one.score_before for one in every if one.score_before is not None}) if by_score else [0.0]
    ax.plot([100] * len(dense), dense, "*", color=INK, markersize=13, label="dense network", zorder=4)
    smallest = min(one.share(measure) for one in every)
    if 0 < smallest < 1 / 8:
        drawing.log_axis(ax.xaxis)
    ax.set(xlabel=f"{_MEASURES.get(measure, measure)} left (%)", ylabel=score)
    return drawing.finish(ax, path)


def _draw_front(
    ax: Axes, points: tuple[Array, Array], color: str, marker: str, label: str, dashed: bool = False
) -> None:
    """Draw points on the front, joined, and faintly the others."""
    best, rest = points
    if best.size:
        fill = "none" if dashed else color
        joined, *_ = ax.plot(*best, "--" if dashed else "-", linewidth=1.8, label=label)
        others, *_ = ax.plot(*rest, linestyle="none", alpha=0.35)
        for line in (joined, others):
            line.set(color=color, marker=marker, markersize=5.5, markerfacecolor=fill)


def plot_convergence(
    histories: Mapping[str, Solution | History],
    path: Path | None = None,
    *,
    against: Literal["iteration", "seconds"] = "iteration",
    colors: Sequence[str] = COLORS,
    lowest: float = 1e-9,
    ax: Axes | None = None,
) -> Axes:
    """Plot the certified gap of several solves, relative to each final objective; returns the Axes.

    Parameters
    ----------
    histories : {label: Solution or History}
        The start (iteration 0) is left out, as both axes are logarithmic.
    path, ax : optional
    against : {"iteration", "seconds"}
    colors : sequence of str
        One a history, in order.
    lowest : float
        Lower end of the axis; Newton's gaps fall far below the tolerances of the other methods.

    Raises
    ------
    TypeError
        When ``histories`` is not a mapping.
    ValueError
        When it is empty.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> solutions = {solve.__name__: solve((r_xx, r_yx), 0.1) for solve in (ps.newton, ps.fista)}
    >>> axes = ps.plot_convergence(solutions, "convergence.png")
    """
    known = histories_of(histories)
    ax = ax or drawing.new_axes()
    for (label, history), color in zip(known.items(), cycle(colors), strict=False):
        x = history.seconds if against == "seconds" else np.arange(len(history.gap))
        gaps = history.gap[1:] / (abs(history.objective[-1]) or 1.0)
        ax.plot(x[1:], gaps, color=color, linewidth=1.8, label=label)
    xlabel = "time (s)" if against == "seconds" else "iteration"
    ax.set(xlabel=xlabel, ylabel="relative gap", ylim=(lowest, 1))
    drawing.log_axis(ax.xaxis)
    drawing.log_axis(ax.yaxis)
    # Every curve falls from 1 or below: the upper right corner is free.
    return drawing.finish(ax, path, grid="y", loc="upper right", borderaxespad=0.1)


def plot_elimination(
    curves: EliminationPath | Mapping[str, EliminationPath] | Report,
    path: Path | None = None,
    *,
    lowest: float = 1e-6,
    ax: Axes | None = None,
) -> Axes:
    """Plot the error against the channels kept, one curve a site; returns the Axes.

    Parameters
    ----------
    curves : EliminationPath, {label: EliminationPath} or Report
        The error is a share of the outputs' energy E‖y‖² or, for a path computed without ``r_yy``, of the
        part that all inputs together explain. A report's chosen sizes are marked. More than six curves are
        drawn over the share of the channels, coloured from the first site to the last.
    path, ax : optional
    lowest : float
        Lower end of the axis, as a share; with all channels kept only rounding is left.

    Raises
    ------
    TypeError
        When ``curves`` is none of these.
    ValueError
        When there are no curves.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> axes = ps.plot_elimination(ps.elimination_path((r_xx, r_yx)), "elimination.png")
    """
    found = error_curves(curves)
    ax = ax or drawing.new_axes()
    many = len(found) > NAMED
    bottom = _elimination_axes(ax, found, many, lowest)
    for curve, (color, label) in zip(found, drawing.sequence([one.label for one in found]), strict=False):
        x = 100 * curve.kept / curve.channels if many else curve.kept
        # No error, or rounding, would fall straight down from the last size before.
        y = 100 * np.maximum(curve.error, lowest)
        ax.plot(x, y, color=color, linewidth=1.2 if many else 1.8, label=label)
        here = curve.kept == curve.chosen
        ax.plot(x[here], np.maximum(y[here], bottom), "o", color=color, ms=4 if many else 7, clip_on=False)
    if any(curve.chosen is not None for curve in found):
        ax.plot([], [], "o", color=INK, markersize=5, label="chosen")
    return drawing.finish(ax, path)


def _elimination_axes(ax: Axes, found: Sequence[Curve], many: bool, lowest: float) -> float:
    """Label the axes and make them logarithmic; returns the lower end, above rounding errors."""
    widths = [curve.channels for curve in found]
    errors = np.concatenate([curve.error for curve in found])
    bottom = float(70 * errors[errors >= lowest].min(initial=1))
    ax.set(xlabel=f"channels kept{' (%)' * many}", ylabel="error (% of the outputs' energy)")
    ax.set_ylim(bottom, 130)
    drawing.log_axis(ax.yaxis)
    if not many and max(widths) > 3 * min(widths):
        ax.set_xlim(0.9, 1.15 * max(widths))
        drawing.log_axis(ax.xaxis)
    return bottom


def plot_channels(report: Report, path: Path | None = None, *, ax: Axes | None = None) -> Axes:
    """Plot the channels kept of each site, one bar a site, the network's first on top; returns the Axes.

    Parameters
    ----------
    report : Report
        Sites that cannot shrink are grey.
    path, ax : optional
        A new figure is the higher the more sites there are.

    Raises
    ------
    ValueError
        When the report has no sites.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> smaller = ps.compress(model, batches, keep=0.5, latency=False)
    >>> axes = ps.plot_channels(smaller.report, "channels.png")
    """
    check_report(report)
    sites = report.sites
    if not sites:
        raise ValueError("the report has no sites to draw: those of compress and sweep have.")
    size = 10 if len(sites) <= 24 else 8
    ax = ax or drawing.new_axes(height=1.1 + 0.025 * (size + 2) * len(sites))
    rows = np.arange(len(sites))
    free = np.array([one.pinned is None for one in sites])
    kept = np.array([100 * one.kept / one.channels for one in sites])
    ax.barh(rows[free], kept[free], height=0.7, color=COLORS[0], label="kept")
    ax.barh(rows[free], 100 - kept[free], left=kept[free], height=0.7, color=INK, alpha=0.12, label="removed")
    if not free.all():
        ax.barh(rows[~free], 100, height=0.7, color=COLORS[3], label="cannot shrink")
    for row, one in enumerate(sites):
        text = f"{one.kept:,} of {one.channels:,}"
        ax.text(101.5, row, text, va="center", fontsize=size, color=INK, alpha=0.6 if one.pinned else 1)
    ax.set_yticks(rows, [drawing.shortened(one.name) for one in sites], fontsize=size)
    ax.set(xlabel="channels kept (%)", xlim=(0, 100), ylim=(len(sites) - 0.4, -0.6))
    return drawing.finish(ax, path, grid=None, ncols=3)


def plot_weights(
    weights: Mapping[str, object],
    path: Path | None = None,
    *,
    thresholds: float | Mapping[str, float] | None = None,
    bins: int = 120,
    ax: Axes | None = None,
) -> Axes:
    """Plot histograms of the weights of layers, counts on a logarithmic axis; returns the Axes.

    Parameters
    ----------
    weights : {name: array or tensor}
        Of layers, or a network's ``state_dict()``, whose vectors are left out. Weights that are exactly zero
        are counted in the label and not drawn.
    path, ax : optional
    thresholds : float or {name: float}, optional
        Magnitudes below which weights are removed, drawn on both sides of zero.
    bins : int
        Over the range of all layers.

    Raises
    ------
    TypeError
        When ``weights`` is not a mapping.
    ValueError
        When there are no weights, one is not finite, or a threshold is negative or of an unknown layer.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> axes = ps.plot_weights(model.state_dict(), "weights.png", thresholds=0.05)
    """
    limits, layers = histograms(weights, thresholds, bins)
    ax = ax or drawing.new_axes()
    width = layers[0].edges[1] - layers[0].edges[0]
    # Above the highest bin there is room for the legend.
    highest = max(one.counts.max() for one in layers)
    ax.set(
        yscale="log", ylim=(0.7, 6 * highest + 1), xlabel="weight", ylabel=f"weights per bin of {width:.2g}"
    )
    few = len(layers) <= NAMED
    for one, (color, label) in zip(layers, drawing.sequence([one.label for one in layers]), strict=False):
        note = f" ({one.zeros:.3g} % zeros)" if one.zeros and label else ""
        ax.stairs(one.counts, one.edges, color=color, linewidth=1.4 if few else 1, label=label + note)
        if few:
            ax.stairs(one.counts, one.edges, color=color, fill=True, alpha=0.15)
        for limit in limits.get(one.label, ()):
            ax.axvline(limit, color=color, linewidth=1, linestyle=_DASHES)
    for limit in limits.get("", ()):
        label = "" if limit < 0 else f"threshold ±{limit:.2g}"
        ax.axvline(limit, color=INK, linewidth=1, linestyle=_DASHES, label=label)
    return drawing.finish(ax, path, loc="upper right")
