"""How many channels every site keeps: within a target, as told, or by a penalty; and the report of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from pysolve.correlations import Indices, Mask
from pysolve.errors import PysolveError
from pysolve.methods.budget import choose, costs_of, settle
from pysolve.methods.goal import Target, Values
from pysolve.methods.kinds.channels import site_problem
from pysolve.methods.menu import Menu
from pysolve.methods.price import Probe
from pysolve.methods.study import Study, widths
from pysolve.methods.ties import RoundTo, Ties, alike, apart, grouped, rounded, separate
from pysolve.methods.timed import liked, settle_in_time
from pysolve.methods.weights import reasons as reasons_of
from pysolve.methods.weights import weights_of
from pysolve.nn.cut.bare import Listed, find_member
from pysolve.nn.pretrained.stock import is_pretrained
from pysolve.plan import Site, of_experts, owner
from pysolve.report.rows import Expected, SiteReport, Solve
from pysolve.solve.budget import Costs
from pysolve.solve.certificate import certify
from pysolve.solve.problem import Problem
from pysolve.solve.selection import lasso_solution
from pysolve.solve.solution import Solution
from pysolve.solve.solvers import newton

# Shares of a measure that a dry run tells of.
LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# Of the sum of divergences of single sites, refitted on the original's inputs, so much is left when layers
# are refitted one after the other.
REFITTED = 0.7
# Sizes at which the report tells a site's error.
CURVE_POINTS = 33


@dataclass(frozen=True, eq=False)
class Sized:
    """Channels that stay of the sites that lose some, and what the report tells of all of them.

    Parameters
    ----------
    menus : sequence of Menu
        Of the free sites.
    kept : sequence of (k,) int arrays
    predicted : sequence of float, optional
        Divergence to expect of each, where that was measured.
    notes : tuple of str
    solves : tuple of Solve
    pinned : {Site: str}
        Why sites keep all of their channels, beside those that never could lose any.
    together : int, optional
        Samples that were timed together, where a target names milliseconds.
    """

    menus: Sequence[Menu]
    kept: Sequence[Indices]
    predicted: Sequence[float] | None = None
    notes: tuple[str, ...] = ()
    solves: tuple[Solve, ...] = field(default=())
    pinned: Mapping[Site, str] = field(default_factory=dict)
    together: int | None = None

    @property
    def said(self) -> tuple[str, ...]:
        """The notes, and whether nothing goes."""
        none = () if self.keep else ("nothing was removed: what was asked for keeps all channels",)
        return (*none, *self.notes)

    @property
    def keep(self) -> dict[Site, Indices]:
        """By site, of those that lose channels."""
        pairs = zip(self.menus, self.kept, strict=True)
        return {m.unit: k for m, k in pairs if isinstance(m.unit, Site) and len(k) < m.unit.channels}


def check_free(found: Study) -> None:
    """Refuse a network of which no channel can be removed."""
    if not found.free:
        reasons = sorted({site.pinned for site in found.sites if site.pinned})
        parts = chain.from_iterable((*site.writers, *site.readers, *site.passed) for site in found.sites)
        named = {name.partition(":")[0] for name in parts}
        with suppress(PysolveError):
            left = weights_of(found.model, found.options.ignore)[1]
            unseen = [one for one in left if one.name not in named]
            reasons += [f"in no site{without}"] if (without := reasons_of(unseen)) else []
        why = "; ".join(reasons) or "it has no sites"
        raise PysolveError(f"no channel of this network can be removed: {why}.")


def with_costs(found: Study) -> Study:
    """The study with those sites alone whose costs are known: experts in a list, or what is inside of them.

    What an expert costs depends on the channels that it keeps, and which experts go is not known beforehand.
    """
    inside = [name for site in found.free for name in site.writers if site.router is None]
    lists = {
        owner(name)
        for site in found.free
        for name in site.readers
        if site.router is not None and isinstance(find_member(found.model, name), Listed)
    }
    shrink = {one for one in lists if any(name.startswith(f"{one}.") for name in inside)}

    def known(site: Site) -> Site:
        path = next(
            (owner(name) for name in site.readers if of_experts(name) and owner(name) in shrink), None
        )
        if path is None:
            return site
        return replace(
            site,
            pinned="under a target these experts lose channels: keep removes whole ones, as does a target "
            f"with ignore=['re:{path}..*']",
        )

    return replace(found, sites=[known(site) for site in found.sites])


def within(
    found: Study,
    menus: Sequence[Menu],
    target: Target,
    where: Probe,
    round_to: RoundTo = 1,
    ties: Ties | None = None,
) -> Sized:
    """The sizes of least divergence within a target; with ties, one for each group of sites."""
    own, costs = rounded(found, ties or separate(found), round_to), costs_of(found)
    units, notes, together = grouped(menus, own), [], None
    if "ms" in target:
        in_time = settle_in_time(found, costs, own.groups, units, target, where)
        done, costs, target, together = in_time.done, in_time.costs, in_time.target, in_time.samples
        notes.append(in_time.note)
    else:
        done = settle(found, costs.tied(own.groups), units, (), target, where)
    menus, sizes, predicted = [*menus], [0] * len(menus), [0.0] * len(menus)
    for group, unit, k in zip(own.groups, done.sites, done.sizes, strict=True):
        for i in group:
            menus[i] = unit if len(group) == 1 else menus[i]
            sizes[i], predicted[i] = k, float(menus[i].curve[k])
    if not ties:
        predicted = done.predicted
    chosen = replace(sized(found, menus, sizes, predicted), pinned=own.pinned, together=together)
    other = rounded(found, separate(found) if ties else alike(found), round_to)
    if len(other.groups) != len(own.groups):
        expected = _expected(costs, grouped(menus, other), other, target)
        # Without asking which sites a configuration counts.
        least = ties is None and is_pretrained(found.model)
        notes.append(_compared(sum(predicted), expected, uniform=ties is not None, least=least))
    return replace(chosen, notes=tuple(notes))


def expected(
    found: Study,
    menus: Sequence[Menu],
    target: Target,
    round_to: RoundTo = 1,
    ties: Ties | None = None,
) -> tuple[Expected, ...]:
    """What a target would cost, before anything is cut; of a single share, also what others would cost."""
    own, costs = rounded(found, ties or separate(found), round_to), costs_of(found)
    units = grouped(menus, own)
    (measure, share), *more = target.items()
    shares = [] if more or share > 1 else LADDER
    wanted = [{measure: other} for other in sorted({*shares, share}, reverse=True)] if not more else [target]
    sums = ((one, _expected(costs, units, own, one)) for one in wanted)
    return tuple(Expected(one, None if found is None else REFITTED * found) for one, found in sums)


def _expected(costs: Costs, units: Sequence[Menu], ties: Ties, target: Target) -> float | None:
    """The divergence to expect of the best sizes with some ties; None where none are within the target."""
    tied = costs.tied(ties.groups)
    units = liked(units, tied) if tied.seen else units
    try:
        sizes, _ = choose(tied, units, (), target)
    except PysolveError:
        return None
    return float(sum(unit.curve[k] for unit, k in zip(units, sizes, strict=True)))


def _compared(own: float, other: float | None, *, uniform: bool, least: bool) -> str:
    """What either choice of widths is expected to cause, for the report."""
    kinds = ["layers of their own widths", "one width for all repeated layers"]
    words = "beyond the target" if other is None else f"{'at least ' * least}{other:.3g}"
    name = "per_layer" if uniform else "uniform"
    return (
        f"expected divergence: {own:.3g} with {kinds[uniform]}, {words} with {kinds[not uniform]} "
        f'(widths="{name}")'
    )


def sized(
    found: Study, menus: Sequence[Menu], sizes: Sequence[int], predicted: Sequence[float] | None = None
) -> Sized:
    """Channels of every free site at its size, with the solves that a lasso took them from."""
    sites = zip(found.free, menus, sizes, strict=True)
    kept = [np.arange(k) if k == site.channels else menu.at(k).keep[site] for site, menu, k in sites]
    return Sized(menus, kept, predicted, (), tuple(_lasso_solves(found, menus, sizes)))


def by_keep(
    found: Study, menus: Sequence[Menu], keep: Values, round_to: RoundTo = 1, ties: Ties | None = None
) -> Sized:
    """As many channels as told: of sites that are tied, as told of any of them; 0 of each that is told so."""
    _check_names(found, "keep", keep)
    gone = [i for i, site in enumerate(found.free) if isinstance(keep, Mapping) and _entry(site, keep) == 0]
    own, sizes = apart(rounded(found, ties or separate(found), round_to), gone), [0] * len(menus)
    for group, allowed in zip(own.groups, own.allowed, strict=True):
        told = {found.free[i].name: _entry(found.free[i], keep) for i in group}
        values = {value for value in told.values() if value is not None}
        if len(values) > 1:
            raise ValueError(f"these sites keep equally many channels, which cannot be several: {told}.")
        for i in group:
            sizes[i] = _size(found.free[i], next(iter(values), None), allowed)
    whole = {site: why for site, why in own.pinned.items() if found.free.index(site) not in gone}
    chosen = replace(sized(found, menus, sizes), pinned=whole)
    for site in chosen.keep:
        if site.attention and any(site.overlaps(other) for other in chosen.keep if other is not site):
            raise ValueError(
                f"keep removes whole heads, too, where it removes {site.name}: give one of both."
            )
    return chosen


def by_lam(found: Study, menus: Sequence[Menu], lam: Values) -> Sized:
    """The non-zero groups of the joint group lasso over each site's readers."""
    _check_names(found, "lam", lam)
    kept, notes, solves = [], [], []
    for site, menu in zip(found.free, menus, strict=True):
        penalty, keep = _entry(site, lam), np.arange(site.channels)
        if penalty is not None:
            problem, _ = site_problem(site, found.correlations, widths(found, site), normalised=False)
            solution = newton(problem, penalty)
            keep = solution.keep
            solves.append(_certified(site, problem, solution))
        if not len(keep):
            notes.append(f"lam = {penalty:.3g} leaves no channel of {site.name}: the most useful one stays.")
            keep = menu.at(1).keep[site]
        kept.append(keep)
    return Sized(menus, kept, None, tuple(notes), tuple(solves))


def site_reports(found: Study, sized: Sized) -> Iterator[SiteReport]:
    """What happened to every site."""
    numbers = iter(range(len(sized.menus)))
    gone = [site.branch for site, kept in sized.keep.items() if site.branch is not None and not len(kept)]
    idle = {name for branch in gone for name in branch.idle}
    for site in found.sites:
        if site.pinned is not None:
            yield SiteReport(site.name, site.width, site.width, pinned=site.pinned)
            continue
        s = next(numbers)
        menu, k = sized.menus[s], len(sized.kept[s])
        if site.writers and idle.issuperset(site.writers):
            # Without the last channels of a branch, those in front of them go, too.
            k = 0
        shown = np.unique(np.geomspace(1, site.channels, CURVE_POINTS).round().astype(int))
        yield SiteReport(
            site.name,
            site.channels,
            k,
            error=float(menu.error[k]) * (k < site.channels),
            predicted=None if sized.predicted is None else sized.predicted[s],
            measured=None
            if sized.predicted is None
            else menu.measured.get(k, 0.0 if k == site.channels else None),
            seconds=menu.seconds,
            pinned=sized.pinned.get(site),
            curve=tuple((int(n), float(f"{menu.error[n]:.4g}")) for n in shown),
        )


def experts_lost(found: Study, sized: Sized) -> dict[str, tuple[int, int, float]]:
    """Of mixtures with fewer experts, by the router: how many before and after, and what the first took."""
    rows = zip(found.free, sized.menus, sized.kept, strict=True)
    return {
        site.router.removesuffix(".weight"): (site.channels, len(kept), float(menu.error[site.channels - 1]))
        for site, menu, kept in rows
        if site.router is not None and len(kept) < site.channels
    }


def _lasso_solves(found: Study, menus: Sequence[Menu], sizes: Sequence[int]) -> Iterator[Solve]:
    """The solves that the lasso took its channels from."""
    for site, menu, k in zip(found.free, menus, sizes, strict=True):
        if menu.method not in ("lasso", "weighted_lasso") or k in (0, site.channels):
            continue
        problem, _ = site_problem(site, found.correlations, widths(found, site))
        solved = lasso_solution(problem, k, weighted=menu.method == "weighted_lasso")
        if solved is not None:
            yield _certified(site, *solved)


def _certified(site: Site, problem: Problem, solution: Solution) -> Solve:
    """A solve with its certificate, by code that no solver shares."""
    M = [*solution.M] if isinstance(solution.M, tuple) else [solution.M]
    judged = certify(
        [*problem.xx],
        [*problem.yx],
        M,
        solution.lam,
        group_size=problem.group_size,
        weights=problem.weights,
    )
    return Solve(
        site.name,
        solution.method,
        solution.lam,
        len(solution.keep),
        judged.relative_gap,
        judged.kkt,
        solution.iterations,
        solution.seconds,
    )


def _check_names(found: Study, what: str, values: Values) -> None:
    """Refuse names that are no writers of sites that can shrink, and sites of another network."""
    writers = list(dict.fromkeys(name for site in found.free for name in site.writers))
    pinned = {name: site.pinned for site in found.sites for name in site.writers if site.pinned}
    for name in values if isinstance(values, Mapping) else ():
        if isinstance(name, Site):
            if name not in found.free:
                why = next((f": {one.pinned}" for one in found.sites if one == name and one.pinned), "")
                raise ValueError(
                    f"{what} names the site {name.name}, which is none of those that can shrink{why}."
                )
        elif name not in writers:
            why = (
                f"whose channels cannot be removed ({pinned[name]})"
                if name in pinned
                else "which writes no site"
            )
            raise ValueError(f"{what} names {name!r}, {why}; those that can shrink: {', '.join(writers)}.")


def _entry(site: Site, values: Values) -> float | None:
    """What a setting says for a site: by itself, by any of its writers' names, or the same for all."""
    if not isinstance(values, Mapping):
        return values
    if site in values:
        return values[site]
    given = {name: values[name] for name in site.writers if name in values}
    if len(set(given.values())) > 1:
        raise ValueError(f"{', '.join(given)} write one site, which cannot have several values: {given}.")
    return next(iter(given.values()), None)


def _size(site: Site, value: float | None, allowed: Mask) -> int:
    """The allowed size nearest to what was told, of two the larger; none only where that was told."""
    if value is None:
        return site.channels
    if not value:
        if site.least:
            raise ValueError(
                f"keep of {site.name} is 0, but one channel must stay: without any, more than a constant in "
                "a sum would be left."
            )
        return 0
    wanted = value * site.channels if value <= 1 and not isinstance(value, int | np.integer) else value
    sizes = 1 + np.flatnonzero(allowed[1:])[::-1]
    return int(sizes[np.argmin(np.abs(sizes - round(wanted)))])
