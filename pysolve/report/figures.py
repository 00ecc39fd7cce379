"""Plots of the demonstration: accuracy at every size, and the share of each cost that is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from pysolve.report.drawing import COLORS, INK, finish, log_axis, new_axes


def accuracy_curves(
    kept: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    *,
    dense: float,
    chosen: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot accuracy against the number of neurons kept, best curve first.

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
    ax.axhline(dense, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="original network")
    blue, orange, _, grey = COLORS
    for above, (label, values), color in zip((5, 4, 3), curves.items(), (blue, orange, grey), strict=False):
        ax.plot(kept, values, color=color, marker="o", markersize=4, linewidth=1.8, label=label, zorder=above)
    if chosen is not None:
        first = next(iter(curves.values()))
        height = first[list(kept).index(chosen)]
        ax.plot(chosen, height, "o", markersize=11, markeredgewidth=1.8, color=blue, fillstyle="none")
    log_axis(ax.xaxis)
    ax.set(xlabel="neurons kept", ylabel="test accuracy (%)", ylim=(0, 104))
    return finish(ax, grid="y", loc="lower right")


def cost_bars(
    before: Mapping[str, float],
    after: Mapping[str, float],
    texts: Mapping[str, str] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plot the share of each cost of the original that is left, one bar a cost.

    Parameters
    ----------
    before, after : {cost: value}
        Values above zero, with the same keys.
    texts : {cost: str}, optional
        Text next to the bar, by default the share in per cent.
    ax : Axes, optional
        Where to draw; by default in a new figure.
    """
    ax = ax or new_axes()
    names = list(before)
    shares = [100 * after[name] / before[name] for name in names]
    rows = range(len(names))
    ax.barh(rows, [100] * len(names), color=INK, alpha=0.2, height=0.62)
    ax.barh(rows, shares, color=COLORS[0], height=0.62)
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
            color="white" if inside else INK,
        )
    ax.set_yticks(list(rows), names)
    ax.invert_yaxis()
    ax.set(xlabel="left of the original (%)", xlim=(0, max(102.0, *shares)))
    return finish(ax, grid=None)
