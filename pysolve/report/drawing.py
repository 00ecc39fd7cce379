"""Common parts of all plots: colours, axes, ticks, files."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path as PathOf

import numpy as np
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from pysolve.whole_files import replacing

Path = str | os.PathLike[str]

# Colour of text, ticks and spines and, more or less transparent, of everything without a colour of its own:
# replacing this one colour in an SVG adapts a plot to another background.
INK = "#1f2a30"
# Distinguishable with any kind of colour vision, on white and on black.
COLORS = ("#0b6e99", "#e0902f", "#a63a50", "#9a9a9a")
SHADES = ("#b7d3de", "#7fb0c4", "#4387a1", "#064a63")
MARKERS = ("o", "s", "D", "^", "v")

# More curves than this are coloured in sequence, and only the first and the last are named.
NAMED = 6
# Ratios of a logarithmic axis's ends up to which ticks at 1, 2, 5, 10 and at 1, 10 have room.
_FINE, _COARSE = 2000, 1e6


class Shown(Axes):
    """Axes that notebooks show."""

    def _repr_png_(self) -> bytes:
        with io.BytesIO() as picture:
            self.figure.figure.savefig(picture, dpi=100, format="png")
            return picture.getvalue()


def new_axes(width: float = 7.0, height: float = 4.2) -> Axes:
    """Axes in a new figure."""
    return Figure(figsize=(width, height), layout="constrained").add_subplot(axes_class=Shown)


def styles() -> Iterator[tuple[str, str]]:
    """Colours and markers of successive curves; 20 differ."""
    return zip(cycle(COLORS), cycle(MARKERS), strict=False)


def sequence(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Colours and labels of curves; of many, a sequential colour map and labels at its ends alone."""
    # Labels that begin with _ would not be shown.
    labels = [f" {name}" if name.startswith("_") else name for name in map(shortened, names)]
    if len(names) <= NAMED:
        return zip(cycle((*COLORS, SHADES[1], SHADES[3])), labels, strict=False)
    ends = [f"first: {names[0]}", *[""] * (len(names) - 2), f"last: {names[-1]}"]
    # The map's ends, too dark and too light to read, are left out.
    shades = colormaps["plasma"](np.linspace(0.28, 0.85, len(names)))
    return zip(map(to_hex, shades), map(shortened, ends), strict=True)


def log_axis(axis: Axis) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2, 5, 10, … or, over many decades, powers of 10."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})  # type: ignore[attr-defined]
    low, high = axis.get_view_interval()
    if high <= _FINE * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if high <= _COARSE * low:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_minor_locator(NullLocator())


def shortened(name: str, width: int = 38) -> str:
    """At most ``width`` characters of a name, with $ escaped for matplotlib."""
    short = name if len(name) <= width else name[: width - 1] + "…"
    return short.replace("$", r"\$")


def finish(ax: Axes, path: Path | None = None, *, grid: str | None = "both", **legend: object) -> Axes:
    """Add the legend and a light grid, remove boxes, use one ink, and save the figure if asked."""
    if ax.get_legend_handles_labels()[0]:
        look = {"frameon": False, "labelcolor": INK, "labelspacing": 0.35, "handlelength": 2.4}
        # Above the axes nothing hides a curve.
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "borderaxespad": 0.2}
        ax.legend(**{**look, **(legend if "loc" in legend else {**place, **legend})})
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[:].set_color(INK)
    ax.tick_params(which="both", color=INK, labelcolor=INK)
    for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
        text.set_color(INK)
    ax.set_axisbelow(True)
    if grid is not None:
        ax.grid(axis=grid, color=INK, alpha=0.12)  # type: ignore[arg-type]
    if path is not None:
        # Axes may lie in a part of a figure, which cannot be saved alone.
        save_figure(ax.figure.figure, path)
    return ax


def save_figure(figure: Figure, path: Path, *, dpi: int = 160) -> None:
    """Write a figure, completely or not at all, in the format of the name's ending."""
    path = PathOf(path)
    # As matplotlib names files without an ending.
    kind = path.suffix.removeprefix(".") or str(rcParams["savefig.format"])
    known = figure.canvas.get_supported_filetypes()
    if not path.name or kind.lower() not in known:
        raise ValueError(f"path must end in one of .{', .'.join(sorted(known))}, got {str(path)!r}.")
    path = path if path.suffix else path.with_name(f"{path.name}.{kind}")
    # Some writers of pictures say nothing of a full disk.
    with io.BytesIO() as picture:
        figure.savefig(picture, dpi=dpi, format=kind)
        content = picture.getvalue()
    with replacing(path, len(content)) as part:
        part.write_bytes(content)
