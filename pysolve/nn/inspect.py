"""Sites of a network that can shrink, and their possible savings, before any work starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from operator import eq
from textwrap import wrap

from torch import nn

from pysolve.nn.batches.items import Transform, example_of
from pysolve.nn.batches.samples import laid_out
from pysolve.nn.cost.costs import cost_model
from pysolve.nn.graph.sites import find_sites
from pysolve.nn.layers.attention import opened
from pysolve.nn.plain import plain_network
from pysolve.nn.running import Batch, Ignored
from pysolve.plan import Site, check_listed
from pysolve.solve.budget import Costs
from pysolve.tables import Table, as_html, one_screen
from pysolve.whole_files import Json

# Characters of a line of the table, and of a site's name in it.
_LINE, _NAME = 110, 52


@dataclass(frozen=True)
class SiteRow:
    """One site of a network.

    Parameters
    ----------
    name : str
    channels : int
        Of one that is pinned, the channels that its first writer makes.
    writers, readers : tuple of str
        Names of the layers.
    params, macs : float, optional
        Share of the network's that removing all channels of the site would save; None when pinned.
    pinned : str, optional
        Why its channels cannot be removed.
    """

    name: str
    channels: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    params: float | None
    macs: float | None
    pinned: str | None


@dataclass(frozen=True)
class Inspection:
    """Sites of a network; prints as a table.

    Parameters
    ----------
    rows : tuple of SiteRow
    params, macs, bytes : int
        Totals of the network, MACs for one sample.
    """

    rows: tuple[SiteRow, ...]
    params: int
    macs: int
    bytes: int

    def as_dict(self) -> Json:
        """Everything as plain numbers, strings, sequences and dictionaries, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return one_screen(str(self).splitlines())

    def _repr_html_(self) -> str:
        """Shown by notebooks."""
        free = [row for row in self.rows if row.pinned is None]
        cells = ((row.name, f"{row.channels:,}", f"{row.params:.1%}", f"{row.macs:.1%}") for row in free)
        shrink = Table("Can shrink", ("site", "channels", "parameters", "MACs"), tuple(cells))
        pinned = ((row.name, f"{row.channels:,}", row.pinned) for row in self.rows if row.pinned is not None)
        stay = Table("Cannot shrink", ("site", "channels", "because"), tuple(pinned), words=(0, 2))
        totals = (
            f"<p>{self.params:,} parameters, {self.macs:,} MACs a sample, {self.bytes:,} bytes in memory</p>"
        )
        return "\n".join([totals, *(as_html(table) for table in (shrink, stay) if table.rows)])

    def __str__(self) -> str:
        width = min(_NAME, max((len(row.name) for row in self.rows), default=0))
        width = max(width, len("cannot shrink"))
        lines = [f"{self.params:,} parameters, {self.macs:,} MACs a sample, {self.bytes:,} bytes in memory"]
        lines += _free_lines([row for row in self.rows if row.pinned is None], width)
        lines += _pinned_lines([row for row in self.rows if row.pinned is not None], width)
        return "\n".join(lines)


def inspect(
    model: nn.Module,
    example_inputs: Batch,
    *,
    sites: Sequence[Site] | None = None,
    ignore: Iterable[Ignored] = (),
    transform: Transform | None = None,
) -> Inspection:
    """Find which channels of a network can be removed, what that could save, and why others cannot.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    example_inputs : one batch
        A tensor, a tuple or list whose first item is the input, or a mapping of keyword arguments; or a
        DataLoader, or a Dataset of single samples, of which the first batch is taken.
    sites : sequence of Site, optional
        By default all that ``find_sites`` finds.
    ignore : iterable of str, types or modules
        Layers whose channels are kept, for ``find_sites``.
    transform : callable, optional
        Makes such a batch of what is given, or of a loader's first item.

    Returns
    -------
    Inspection
        Prints as a table.

    Raises
    ------
    DataError
        When the network refuses the batch.
    PysolveError
        When torch.export cannot follow the network.
    LayerNotFoundError
        When a name or pattern in ``ignore`` belongs to no layer.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> print(ps.inspect(model, torch.randn(10, 16)))
    1,348 parameters, 1,280 MACs a sample, 5,392 bytes in memory
    <BLANKLINE>
    can shrink     channels    params      MACs
    0 → 2                64    99.7 %   100.0 %
    params, MACs: the share that removing all channels of the site would save
    <BLANKLINE>
    cannot shrink  channels  because
    2 → nothing           4  the network's output
    """
    if sites is not None:
        check_listed(sites)
    model, example_inputs = plain_network(model), example_of(example_inputs, transform)
    found = list(find_sites(model, example_inputs, ignore=ignore, attention=True) if sites is None else sites)
    costs = cost_model(opened(model), found, laid_out(model, example_inputs, ())[0])
    rows = tuple(_row(site, costs, s) for s, site in enumerate(found))
    return Inspection(rows, *(round(costs.original[measure]) for measure in ("params", "macs", "bytes")))


def _row(site: Site, costs: Costs, s: int) -> SiteRow:
    kept, total = costs.channels.copy(), costs.original
    kept[s] = 0
    left = costs.cost(kept)

    def saved(measure: str) -> float | None:
        if site.pinned is not None:
            return None
        return 1.0 - left[measure] / total[measure] if total[measure] else 0.0

    channels = site.channels if site.pinned is None else site.width
    return SiteRow(
        site.name, channels, site.writers, site.readers, saved("params"), saved("macs"), site.pinned
    )


def _free_lines(rows: Sequence[SiteRow], width: int) -> list[str]:
    """Sites that can shrink, with their shares."""
    if not rows:
        return ["", "no channels can be removed"]
    lines = [f"{'can shrink':<{width}}  channels    params      MACs"]
    for row in rows:
        shares = "".join(f"{100 * (share or 0.0):>8.1f} %" for share in (row.params, row.macs))
        lines.append(f"{_short(row.name, width):<{width}}  {row.channels:>8,}{shares}")
    return ["", *lines, "params, MACs: the share that removing all channels of the site would save"]


def _pinned_lines(rows: Sequence[SiteRow], width: int) -> list[str]:
    """Sites that cannot shrink, with their reasons, wrapped."""
    lines = ["", f"{'cannot shrink':<{width}}  channels  because"] if rows else []
    for row in rows:
        lead = f"{_short(row.name, width):<{width}}  {row.channels:>8,}  "
        first, *rest = wrap(row.pinned or "", _LINE - len(lead)) or [""]
        lines += [lead + first, *(" " * len(lead) + line for line in rest)]
    return lines


def _short(name: str, width: int) -> str:
    """A name in at most ``width`` characters: without the blocks that both layers share, or cut in front."""
    if len(name) <= width:
        return name
    writer, _, reader = name.partition(" → ")
    shared = sum(takewhile(bool, map(eq, writer.split("."), reader.split("."))))
    if shared:
        reader = ".".join(["…", *reader.split(".")[shared:]])
    half = (width - 3) // 2
    # A short side leaves its room to the other.
    room = max(half, width - 3 - len(reader)), max(half, width - 3 - len(writer))
    sides = zip((writer, reader), room, strict=True)
    return " → ".join(side if len(side) <= most else "…" + side[1 - most :] for side, most in sides)
