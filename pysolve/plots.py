"""Pictures of compressed networks, drawn with matplotlib's object interface: no display is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Literal

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
except ImportError as error:
    raise ImportError(
        "pictures need matplotlib, which is not installed: pip install 'pysolve[demo]'."
    ) from error

from pysolve.solution import History

COLORS = ("#0b6e99", "#e0902f", "#9a9a9a", "#a63a50")
SHADES = ("#b7d3de", "#7fb0c4", "#4387a1", "#064a63")
_DENSE, _SMALL = "#c9d3d9", COLORS[0]


def new_axes(width: float = 6.0, height: float = 4.0) -> Axes:
    """Axes in a figure of their own."""
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def accuracy_curves(
    kept: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    *,
    dense: float,
    chosen: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against the number of neurons that stay, best curve first.

    Parameters
    ----------
    kept : (n,) ints
    curves : {label: (n,) floats}
        Accuracy in per cent at each number of neurons.
    dense : float
        The original's accuracy, drawn as a dashed line.
    chosen : int, optional
        A number of neurons to mark on the first curve.
    ax : Axes, optional
        Where to draw; by default in a new figure.
    """
    ax = ax or new_axes()
    ax.axhline(dense, color="0.35", linewidth=1, linestyle=(0, (4, 3)), label="original network")
    for above, (label, values), color in zip((5, 4, 3), curves.items(), COLORS, strict=False):
        ax.plot(kept, values, color=color, marker="o", markersize=4, linewidth=1.8, label=label, zorder=above)
    if chosen is not None:
        first = next(iter(curves.values()))
        height = first[list(kept).index(chosen)]
        ax.plot(chosen, height, "o", markersize=11, markeredgewidth=1.8, color=COLORS[0], fillstyle="none")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="neurons kept", ylabel="test accuracy (%)", ylim=(0, 104))
    ax.legend(loc="lower right", frameon=False)
    return _plain(ax, grid="y")


def cost_bars(
    before: Mapping[str, float],
    after: Mapping[str, float],
    texts: Mapping[str, str] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """One bar a cost: how much of the original's is left.

    Parameters
    ----------
    before, after : {cost: value}
        Values above zero, with the same keys.
    texts : {cost: str}, optional
        What to write next to the bar, by default the share in per cent.
    ax : Axes, optional
        Where to draw; by default in a new figure.
    """
    ax = ax or new_axes()
    names = list(before)
    shares = [100 * after[name] / before[name] for name in names]
    rows = range(len(names))
    ax.barh(rows, [100] * len(names), color=_DENSE, height=0.62, label="original")
    ax.barh(rows, shares, color=_SMALL, height=0.62, label="compressed")
    for row, name, share in zip(rows, names, shares, strict=True):
        text = (texts or {}).get(name, f"{share:.0f} %")
        # Inside the bar when it is long enough to hold the text.
        inside = share > 60
        ax.text(
            share - 2 if inside else share + 2,
            row,
            text,
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
        )
    ax.set_yticks(list(rows), names)
    ax.invert_yaxis()
    ax.set(xlabel="left of the original (%)", xlim=(0, max(102.0, *shares)))
    return _plain(ax, grid=None)


def convergence_curves(
    histories: Mapping[str, History],
    *,
    against: Literal["iteration", "seconds"] = "iteration",
    colors: Sequence[str] = COLORS,
    lowest: float = 1e-9,
    ax: Axes | None = None,
) -> Axes:
    """How the certified gap of several solves falls, relative to where each objective ended; both axes log.

    Parameters
    ----------
    histories : {label: History}
        Of a Solution. The start (iteration 0) has no place on a logarithmic axis and is left out.
    against : {"iteration", "seconds"}
    colors : sequence of str
        One a history, in order; ``SHADES`` suits the values of one parameter.
    lowest : float
        Where the picture ends; Newton's gaps fall far below what the other methods are asked for.
    ax : Axes, optional
        Where to draw; by default in a new figure.
    """
    ax = ax or new_axes()
    for (label, history), color in zip(histories.items(), cycle(colors), strict=False):
        x = history.seconds if against == "seconds" else np.arange(len(history.gap))
        gaps = history.gap[1:] / abs(history.objective[-1])
        ax.plot(x[1:], gaps, color=color, linewidth=1.8, label=label)
    # Every curve falls from 1 or below: the upper right corner is free for the legend.
    ax.set(xscale="log", yscale="log", xlabel=against, ylabel="relative gap", ylim=(lowest, 1))
    ax.yaxis.set_minor_locator(NullLocator())
    legend = ax.legend(loc="upper right", edgecolor="none", framealpha=1, labelspacing=0.3, borderaxespad=0.1)
    # Over the grid, under the curves.
    legend.set_zorder(1)
    return _plain(ax, grid="y")


def _plain(ax: Axes, grid: str | None) -> Axes:
    """No box around the picture; light grid lines behind it."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    if grid is not None:
        ax.grid(axis=grid, color="0.9")  # type: ignore[arg-type]
    return ax
