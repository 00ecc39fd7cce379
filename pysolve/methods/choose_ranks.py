"""Which layers become two, and of which rank; what the others are left for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pysolve.errors import PysolveError
from pysolve.methods.budget import share
from pysolve.methods.candidates import Candidates, harm_curve_of, seconds_of_both
from pysolve.methods.sizes import Sizes
from pysolve.methods.study import Study
from pysolve.nn.costs import cost_model
from pysolve.nn.running import find_layer


@dataclass(frozen=True)
class Extent:
    """One of three ways to say how far, as ``low_rank`` has them."""

    rank: int | Mapping[str, int] | None = None
    energy: float | None = None
    target: Mapping[str, float] | None = None

    @property
    def named_ranks(self) -> Iterator[tuple[str, Any]]:
        """What ranks were given, for which layers."""
        if isinstance(self.rank, Mapping):
            yield from ((f"the rank of {name}", value) for name, value in self.rank.items())
        elif self.rank is not None:
            yield "rank", self.rank


def choose_ranks(found: Candidates, extent: Extent, *, timed: bool) -> dict[str, int]:
    """Ranks of the layers that become two, all the same, by energy or by name.

    The reasons against the others go to ``found.against``.

    Parameters
    ----------
    found : Candidates
    extent : Extent
        Not a target.
    timed : bool
        Leave layers alone that would take longer.
    """
    if isinstance(extent.rank, Mapping):
        _check_named(found, extent.rank)
    while True:
        ranks = _asked_for(found, extent)
        if not timed or not _without_slower(found, ranks):
            return ranks


def _asked_for(found: Candidates, extent: Extent) -> dict[str, int]:
    ranks = {}
    for name, one in found.open.items():
        wanted: int | None
        if extent.energy is not None:
            wanted = one.rank_for(extent.energy)
        else:
            wanted = extent.rank.get(name) if isinstance(extent.rank, Mapping) else extent.rank
        if wanted is None:
            found.against[name] = "not asked for"
        elif wanted > one.most:
            found.against[name] = f"only ranks up to {one.most} would be smaller"
        else:
            ranks[name] = int(wanted)
    return ranks


def share_out(
    found: Candidates, target: Mapping[str, float], channels: Study | None, *, timed: bool
) -> tuple[Sizes, dict[str, int]]:
    """Channels and ranks that are within a target and do the network the least harm.

    Parameters
    ----------
    found : Candidates
    target : {measure: share or number}
    channels : Study, optional
        Of the sites, where channels may go as well.
    timed : bool
        Leave layers alone that would take longer.
    """
    sites, biases = ([], ()) if channels is None else (channels.free, channels.new_biases)
    names = [*found.open]
    costs = cost_model(found.model, sites, found.held, extra_biases=biases, also=names)
    curves = [] if channels is None else [channels.curve(s) for s in range(len(sites))]
    while True:
        candidates = [*found.open.values()]
        harms = [harm_curve_of(found, one) for one in candidates]
        try:
            sizes, ranks = share(costs, curves, candidates, harms, target)
        except PysolveError as error:
            gone = [name for name in names if name not in found.open]
            hint = f" Left as they are, since they would take longer as two: {', '.join(gone)}; with "
            raise PysolveError(
                f"{error}{hint}layout='factored' they count." if gone else str(error)
            ) from None
        if not timed or not _without_slower(found, ranks):
            break
    kept = (
        [] if channels is None else [one.keep(int(k)) for one, k in zip(channels.choices, sizes, strict=True)]
    )
    return Sizes(kept, [float(curve[k]) for curve, k in zip(curves, sizes, strict=True)]), ranks


def as_chosen(before: Candidates, now: Candidates, ranks: Mapping[str, int]) -> Candidates:
    """Candidates of the narrower network, in the structures that were chosen; some may pay no longer."""
    for name in ranks:
        wanted = before.open[name].spatial
        if name in now.spare and now.spare[name].spatial == wanted:
            now.open[name] = now.spare.pop(name)
        if name in now.open and (now.open[name].most < ranks[name] or now.open[name].spatial != wanted):
            del now.open[name]
            now.against[name] = "it became too narrow for its rank to pay"
    now.seconds.update(before.seconds)
    return now


def _without_slower(found: Candidates, ranks: Mapping[str, int]) -> bool:
    """Take layers that take longer as two off the candidates, or give them their other structure."""
    slower = [name for name, rank in ranks.items() if _is_slower(found, name, rank)]
    for name in slower:
        found.harms.pop(name, None)
        found.seconds.pop(name)
        if name in found.spare:
            found.open[name] = found.spare.pop(name)
        else:
            del found.open[name]
    return bool(slower)


def _check_named(found: Candidates, ranks: Mapping[str, int]) -> None:
    """Refuse layers that cannot have the rank they were named with."""
    for name, rank in ranks.items():
        find_layer(found.model, name)
        if name not in found.open:
            raise PysolveError(f"{name} cannot be factored: {found.against.get(name, 'it has no weight')}.")
        if rank > (most := found.open[name].most):
            raise PysolveError(
                f"rank {rank} of {name} would be no smaller than the layer is: at most {most}."
            )


def _is_slower(found: Candidates, name: str, rank: int) -> bool:
    if name not in found.inputs:
        return False
    timed, *_ = found.seconds.get(name, (0,))
    if rank > timed:
        one, layer = found.open[name], found.layers[name]
        found.seconds[name] = (rank, *seconds_of_both(layer, one, rank, found.inputs[name]))
    _, before, after = found.seconds[name]
    if after >= before:
        found.against[name] = f"rank {rank} would take {after / before:.2f} times as long"
    return after >= before
