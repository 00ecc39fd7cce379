"""Sites that keep equally many channels, so that one number describes all of them, and the sizes allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import combinations
from operator import or_

import numpy as np
from torch import nn

from pysolve.correlations import Mask
from pysolve.errors import PysolveError, one_of
from pysolve.methods.goal import check_pattern, check_whole
from pysolve.methods.menu import Chosen, Menu
from pysolve.methods.study import Study
from pysolve.nn.cut.apply import apply
from pysolve.nn.pretrained.stock import (
    Fields,
    NotStockError,
    PretrainedConfig,
    describe,
    fields_of,
    is_pretrained,
    shapes_of,
    with_fields,
    with_numbers,
)
from pysolve.nn.state import without_values
from pysolve.plan import Collapse, Plan, Site

WIDTHS = ("per_layer", "uniform")
# For all sites, or by a site, the name of a writer of it, or a pattern ``re:…`` of such names.
RoundTo = int | Mapping[str | Site, int]
# Positions among the free sites.
Own = tuple[int, ...]
# Up to so many channels, a configuration is asked about every size; beyond, for a step of at most so many.
_ASKED, _SOME = 256, 256
# Groups of sites that share a field are looked for among so many at most.
_JOINED = 4


@dataclass(frozen=True, eq=False)
class Ties:
    """Which free sites keep equally many channels.

    Parameters
    ----------
    groups : sequence of sequences of int
        Positions among the free sites; each is in one group.
    allowed : sequence of (channels + 1,) bool arrays
        Sizes that each group may have.
    pinned : {Site: str}
        Why sites must keep all channels.
    """

    groups: Sequence[Sequence[int]]
    allowed: Sequence[Mask]
    pinned: Mapping[Site, str] = field(default_factory=dict)


def separate(found: Study) -> Ties:
    """Every site by itself, with any size."""
    return Ties([[i] for i in range(len(found.free))], [_every(site) for site in found.free])


def alike(found: Study) -> Ties:
    """Corresponding sites of repeated layers together: the same names but for numbers, and equal widths."""
    groups: dict[object, list[int]] = {}
    for i, site in enumerate(found.free):
        groups.setdefault(_pattern(site), []).append(i)
    sites = found.free
    return Ties([*groups.values()], [_every(sites[own[0]]) for own in groups.values()])


def uniform(found: Study) -> Ties:
    """``alike``; of networks of transformers, with the sizes of which a configuration exists.

    Raises
    ------
    PysolveError
        Of no site any channel can be removed then.
    """
    ties = alike(found)
    if not is_pretrained(found.model):
        return ties
    fields, shell = fields_of(found.model), without_values(found.model)
    kept, refused = dict[Own, Mask](), dict[Own, str]()
    for own in map(tuple, ties.groups):
        allowed = _allowed(found, shell, fields, own)
        if isinstance(allowed, str):
            refused[own] = allowed
        else:
            kept[own] = allowed
    for several in [*_joined(found, refused)]:
        own = tuple(sorted(i for one in several for i in one))
        allowed = _allowed(found, shell, fields, own) if {*several} <= refused.keys() else ""
        if not isinstance(allowed, str):
            kept[own] = allowed
            refused = {one: why for one, why in refused.items() if one not in several}
    if not kept:
        raise PysolveError(f"no channel of this network can be removed: {'; '.join({*refused.values()})}.")
    whole = {own: _only_all(found.free[own[0]].channels) for own in refused}
    pinned = {found.free[i]: reason for own, reason in refused.items() for i in own}
    return Ties([*kept, *whole], [*kept.values(), *whole.values()], pinned)


def apart(ties: Ties, gone: Sequence[int]) -> Ties:
    """The ties with some sites by themselves, all of whose channels go: layers without them are no layers."""
    groups, allowed = list[Sequence[int]](), list[Mask]()
    for group, mask in zip(ties.groups, ties.allowed, strict=True):
        parts = [[i for i in group if i not in gone], *([i] for i in group if i in gone)]
        groups += [part for part in parts if part]
        allowed += [mask for part in parts if part]
    return replace(ties, groups=groups, allowed=allowed)


def rounded(found: Study, ties: Ties, round_to: RoundTo) -> Ties:
    """The ties with sizes that are multiples of numbers, or all channels.

    Raises
    ------
    ValueError
        A name is of no site that can shrink.
    """
    steps = _steps(found, round_to)
    allowed = []
    for group, mask in zip(ties.groups, ties.allowed, strict=True):
        k, step = np.arange(len(mask)), min(math.lcm(*(steps[i] for i in group)), 2**62)
        allowed.append(mask & ((k % step == 0) | (k == k[-1])))
    return replace(ties, allowed=allowed)


def grouped(menus: Sequence[Menu], ties: Ties) -> list[Menu]:
    """One menu for each group: errors and divergences of its sites add up."""
    return [
        replace(menus[group[0]], allowed=mask)
        if len(group) == 1
        else _together([menus[i] for i in group], mask)
        for group, mask in zip(ties.groups, ties.allowed, strict=True)
    ]


def check_round_to(round_to: RoundTo) -> None:
    """Refuse what is no positive whole number, for all sites or by name."""
    if not isinstance(round_to, Mapping):
        check_whole("round_to", round_to)
        return
    for name, value in round_to.items():
        check_pattern("round_to", name)
        check_whole(f"round_to of {name.name if isinstance(name, Site) else name}", value)


def check_widths(widths: str, lam: object = None) -> bool:
    """Whether widths are to be uniform."""
    one_of("widths", widths, WIDTHS)
    if widths == "uniform" and lam is not None:
        raise ValueError('lam finds a size for each site: give target or keep with widths="uniform".')
    return widths == "uniform"


def _together(menus: Sequence[Menu], allowed: Mask) -> Menu:
    first = menus[0]
    curves = [menu.curve for menu in menus]
    sizes = sorted({size for menu in menus for size in menu.measured if size < menu.whole})
    sizes = [size for size in sizes if all(np.isfinite(curve[size]) for curve in curves)]

    def at(size: int) -> Chosen:
        return reduce(or_, (menu.at(size) for menu in menus))

    return Menu(
        first.unit.name if isinstance(first.unit, Site) else first.unit,
        np.sum([menu.error for menu in menus], axis=0),
        at,
        {size: float(sum(curve[size] for curve in curves)) for size in sizes},
        sum(menu.seconds for menu in menus),
        first.method,
        allowed,
    )


def _every(site: Site) -> Mask:
    """All sizes of a site, but for those below the least."""
    k = np.arange(site.channels + 1)
    return np.asarray((k == 0) | (k >= site.least))


def _only_all(channels: int) -> Mask:
    mask = np.zeros(channels + 1, bool)
    mask[channels] = True
    return mask


def _pattern(site: Site) -> object:
    """Equal for sites of layers that repeat each other."""
    tables = {**site.rows, **site.columns}

    def names(layers: Sequence[str]) -> tuple[object, ...]:
        return tuple((_starred(name), tables[name].shape if name in tables else None) for name in layers)

    return site.channels, len(site.attention), names(site.writers), names(site.passed), names(site.readers)


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _joined(found: Study, refused: Mapping[Own, object]) -> Iterator[tuple[Own, ...]]:
    """Groups of equally many channels, together: one field may count those of encoder and decoder."""
    by_channels: dict[object, list[Own]] = {}
    for own in refused:
        site = found.free[own[0]]
        # Heads and their dimensions are never cut together.
        by_channels.setdefault((site.channels, bool(site.attention)), []).append(own)
    for several in by_channels.values():
        for count in range(min(len(several), _JOINED), 1, -1):
            yield from combinations(several, count)


def _allowed(found: Study, shell: nn.Module, fields: Fields, own: Sequence[int]) -> Mask | str:
    """Sizes of some sites, together, of which a configuration exists; why there is none."""
    sites = [found.free[i] for i in own]
    channels = sites[0].channels
    some = max(channels // 2, sites[0].least)
    if channels < 2:
        return "one channel is left of it"
    if any(one.queries.shape[1] > channels for site in sites for one in site.attention):
        return "no configuration says which frequencies of positions stay"
    plan = Plan(tuple(Collapse(site, np.arange(some)) for site in sites))
    narrow = apply(shell, plan)
    try:
        half = describe(shell, shapes_of(narrow), fields)
    except NotStockError:
        return f"no field of {type(found.model.config).__name__} counts these channels alone"
    try:
        # One ε for norms over other channels as well, or a factor that the code takes from the width.
        _ = with_numbers(narrow, half.config) if any(site.norms for site in sites) else None
    except NotStockError as error:
        return f"no configuration has these numbers: {error}"
    now = dict(fields.values)
    changed = {path: (now[path], value) for path, value in half.changes.items()}

    def accepted(k: int) -> bool:
        steps = {path: a + (b - a) * (channels - k) / (channels - some) for path, (a, b) in changed.items()}
        return all(value == int(value) for value in steps.values()) and _accepts(
            fields.config, {path: int(value) for path, value in steps.items()}
        )

    mask = _every(sites[0])
    if channels <= _ASKED:
        mask[1:channels] &= [accepted(k) for k in range(1, channels)]
        return mask
    step = next((r for r in range(1, _SOME) if accepted(channels - r) and accepted(channels - 2 * r)), None)
    mask[:channels] &= False if step is None else (channels - np.arange(channels)) % step == 0
    return mask


def _accepts(config: PretrainedConfig, changes: Mapping[str, int]) -> bool:
    """Whether a configuration's own checks allow these fields."""
    try:
        with_fields(config, changes)
    # Whatever such checks raise.
    except Exception:
        return False
    return True


def _steps(found: Study, round_to: RoundTo) -> list[int]:
    """Of which number each free site keeps multiples."""
    if not isinstance(round_to, Mapping):
        return [round_to] * len(found.free)
    steps, used = [1] * len(found.free), set[object]()
    for i, site in enumerate(found.free):
        for key, value in round_to.items():
            if key is site or any(_matches(key, name) for name in site.writers):
                steps[i] = math.lcm(steps[i], int(value))
                used.add(key)
    for key in round_to:
        if key not in used:
            raise ValueError(f"round_to names {key!r}, which writes no site that can shrink.")
    return steps


def _matches(key: str | Site, name: str) -> bool:
    if isinstance(key, Site):
        return False
    return bool(re.fullmatch(key[3:], name)) if key.startswith("re:") else key == name
