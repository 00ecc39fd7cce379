"""Whether attention loses whole heads or dimensions of its heads: one of both in each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pysolve.errors import PysolveError
from pysolve.methods.budget import TRIED, Target, choose, costs_of, settle
from pysolve.methods.heads import in_head_axes
from pysolve.methods.kinds.channels import Channels
from pysolve.methods.menu import Chosen, Menu
from pysolve.methods.price import Probe, divergence_of, price
from pysolve.methods.sizes import Sized, sized
from pysolve.methods.study import Study
from pysolve.methods.ties import RoundTo, Ties, grouped, rounded, separate, uniform
from pysolve.plan import Site
from pysolve.solve.budget import Costs


@dataclass(frozen=True, eq=False)
class Dims:
    """A network whose heads may lose dimensions.

    Parameters
    ----------
    study : Study
        Of the network with its heads in their axes, and their dimensions among its sites.
    menus : sequence of Menu
        Of the dimensions, the last of its free sites.
    ties : Ties, optional
        Where widths are uniform.
    """

    study: Study
    menus: Sequence[Menu]
    ties: Ties | None


def without_dims(found: Study) -> tuple[Study, list[Site]]:
    """The study without heads' dimensions, with notes of why some stay, and those that can go."""
    dims = [site for site in found.sites if site.attention]
    whole = replace(found, sites=[site for site in found.sites if not site.attention])
    stay = [site for site in dims if site.pinned is not None]
    said = (
        f"no dimensions can go, {why}: {', '.join(site.name for site in stay if site.pinned == why)}"
        for why in dict.fromkeys(site.pinned for site in stay)
    )
    return replace(whole, notes=(*whole.notes, *said)), [site for site in dims if site.pinned is None]


def with_dims(found: Study, dims: Sequence[Site], kind: Channels, *, one: bool) -> Dims | None:
    """The study with heads in their axes, and menus of their dimensions; None where there are none."""
    if not dims or found.graph is None:
        return None
    turned = in_head_axes(replace(found, sites=[*found.sites, *dims]), dims)
    menus = [kind.menu(turned, site) for site in turned.free if site.attention]
    return Dims(turned, menus, uniform(turned) if one else None)


def menus_of(dims: Dims | None) -> Sequence[Menu]:
    """Menus of dimensions of heads, where these may go."""
    return () if dims is None else dims.menus


def priced(dims: Dims, where: Probe) -> Dims:
    """With the divergences of dimensions alone."""
    return replace(dims, menus=price(dims.study, dims.menus, where))


def contest(
    found: Study,
    heads: Sized,
    dims: Dims,
    target: Target,
    where: Probe,
    round_to: RoundTo = 1,
) -> tuple[Study, Sized]:
    """The study and the sizes of least divergence: without dimensions of heads, or with some of them.

    In every layer heads or their dimensions may shrink. Which of both is chosen by the predicted divergences,
    one group of sites after the other; what comes out is measured, and must beat sizes without dimensions.
    """
    study = dims.study
    own = rounded(study, dims.ties or separate(study), round_to)
    rivals = _rivals(study, own)
    if not rivals:
        return found, heads
    menus = [*heads.menus, *dims.menus]
    costs, units = costs_of(study).tied(own.groups), grouped(menus, own)
    chosen = _chosen(costs, units, rivals, target)
    if not chosen:
        return found, heads
    done = settle(study, costs, _held(units, rivals, chosen), (), target, where)
    before = divergence_of(found, Chosen(heads.keep), where)
    if not done.chosen.keep or divergence_of(study, done.chosen, where) >= before:
        return found, heads
    sizes = [0] * len(menus)
    for group, unit, k in zip(own.groups, done.sites, done.sizes, strict=True):
        for i in group:
            menus[i] = unit if len(group) == 1 else menus[i]
            sizes[i] = k
    predicted = [float(menu.curve[k]) for menu, k in zip(menus, sizes, strict=True)]
    result = replace(sized(study, menus, sizes, predicted), pinned=own.pinned)
    return study, replace(result, notes=heads.notes)


def _rivals(study: Study, own: Ties) -> dict[int, list[int]]:
    """Of every group of dimensions, the groups of heads that the same layers lose."""
    sites = [[study.free[i] for i in group] for group in own.groups]
    return {
        d: [
            i
            for i, others in enumerate(sites)
            if i != d and any(one.overlaps(site) for one in others for site in several)
        ]
        for d, several in enumerate(sites)
        if several[0].attention
    }


def _held(units: Sequence[Menu], rivals: Mapping[int, Sequence[int]], chosen: frozenset[int]) -> list[Menu]:
    """The units of which those that are not chosen stay whole: dimensions, or the heads of chosen ones."""
    still = {d for d in rivals if d not in chosen} | {i for d in chosen for i in rivals[d]}
    return [
        replace(unit, allowed=np.arange(unit.whole + 1) == unit.whole) if i in still else unit
        for i, unit in enumerate(units)
    ]


def _chosen(
    costs: Costs, units: Sequence[Menu], rivals: Mapping[int, Sequence[int]], target: Target
) -> frozenset[int]:
    """Groups of dimensions that shrink in the place of heads, for the least predicted divergence."""
    known = dict[frozenset[int], float]()

    def divergence(some: frozenset[int]) -> float:
        if some not in known:
            menus = _held(units, rivals, some)
            try:
                sizes, _ = choose(costs, menus, (), target)
            except PysolveError:
                return known.setdefault(some, np.inf)
            known[some] = float(sum(menu.curve[k] for menu, k in zip(menus, sizes, strict=True)))
        return known[some]

    best = min((frozenset[int](), frozenset(rivals)), key=divergence)
    for d in [*rivals][:TRIED]:
        best = min(best, best ^ {d}, key=divergence)
    return best
